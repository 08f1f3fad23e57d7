"""Poison put in a known place is found there. Oracles: where it was put, and which rows hold it."""

import functools
import json
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from minigpt2.corpus.prepared import prepare
from minigpt2.tokenizer import Tokenizer
from minigpt2.training.batches import Batches
from minigpt2.training.not_finite import (
    Finding,
    find_nonfinite,
    finding_as_json,
    finding_in_words,
)
from tiny_training import tiny_model

RARE = 48  # the token Q
BATCH_SIZE = 7


def loss_of(model):
    """A summed loss whose head is no module, as in training."""

    def loss(idx, targets):
        logits = model.head(model.hidden(idx))
        return F.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100
        )

    return loss


def find(model, batch, **options):
    return find_nonfinite(model, batch, **{"loss_of": loss_of(model), **options})


def poison(parameter, value=math.nan, where=0):
    with torch.no_grad():
        parameter[where] = value


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Six documents, of which only lamps4.txt has the letter Q."""
    folder = tmp_path_factory.mktemp("texts")
    paths = []
    for number in range(6):
        text = f"The {number}th lamp is lit, and the sea says {number * number}.\n" * 2
        paths.append(folder / f"lamps{number}.txt")
        paths[-1].write_text(text.replace("lamp", "Qamp") if number == 4 else text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        names = [path.name for path in paths]
        return prepare(names, Tokenizer.gpt2(300), val_fraction=0, cache_dir=folder / "cache")


@pytest.fixture
def batches(corpus):
    return Batches(corpus.train, block_size=17, batch_size=BATCH_SIZE, seed=3)


def step_with(batches, wanted):
    """The first step of whose rows `wanted` says that they are right."""
    return next(step for step in range(1000) if wanted(batches.at(step)[0]))


@pytest.fixture
def step(batches):
    """A step with the letter Q in some rows, at the beginning of none."""
    return step_with(batches, lambda idx: 1 < (idx == RARE).any(1).sum() < BATCH_SIZE - 1)


@pytest.fixture
def batch(batches, step):
    return batches.at(step)


MODULES = [
    name
    for name, module in tiny_model().named_modules()
    if isinstance(module, nn.Linear | nn.LayerNorm)
]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_a_poisoned_weight_is_named(batch, name, value, micro_batch_size):
    model = tiny_model()
    weight = model.get_submodule(name).weight
    poison(weight, value, (3,) * weight.dim())
    finding = find(model, batch, micro_batch_size=micro_batch_size)
    assert finding == Finding(
        f"output of {name}",
        f"whose weight has 1 of {weight.numel():,} values not finite",
        rows=(),
        places=(),
    )


@pytest.mark.parametrize("micro_batch_size", [None, 1, 2, 3])
def test_a_poisoned_token_is_found_where_it_stands(batches, corpus, batch, step, micro_batch_size):
    model = tiny_model()
    poison(model.wte.weight, where=RARE)
    finding = find(model, batch, micro_batch_size=micro_batch_size)
    holds = batch[0] == RARE
    assert finding == Finding(
        "output of wte",
        f"whose weight has 14 of 4,200 values not finite (token {RARE})",
        rows=tuple(holds.any(1).nonzero().flatten().tolist()),
        places=tuple(map(tuple, holds.nonzero().tolist())),
    )
    assert finding_in_words(finding, batches.spans(step), corpus.train) == (
        f"first not finite: output of wte, whose weight has 14 of 4,200 values not finite (token "
        f"{RARE}); in {len(finding.rows)} of 7 rows, from lamps4.txt"
    )


def test_of_two_poisons_one_is_named_with_its_own_rows(batch):
    model = tiny_model()
    poison(model.wte.weight, where=RARE)
    poison(model.h[1].mlp.c_fc.weight, where=(3, 4))
    finding = find(model, batch, micro_batch_size=1)
    holds = (batch[0] == RARE).any(1)
    assert finding is not None
    assert finding.where == ("output of wte" if holds[0] else "output of h.1.mlp.c_fc")
    assert finding.rows == tuple((holds == holds[0]).nonzero().flatten().tolist())


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_a_poisoned_token_that_no_row_holds_spoils_the_head(batch, micro_batch_size):
    model = tiny_model()
    absent = [297, 298]
    assert not torch.isin(batch[0], torch.tensor(absent)).any()
    poison(model.wte.weight, where=absent)
    finding = find(model, batch, micro_batch_size=micro_batch_size)
    cause = "where wte.weight has 28 of 4,200 values not finite (tokens 297 and 298)"
    assert finding == Finding("loss", cause, rows=(), places=())


@pytest.mark.parametrize("micro_batch_size", [None, 1, 2])
def test_a_poisoned_position_is_one_of_every_row(batch, micro_batch_size):
    model = tiny_model()
    poison(model.wpe.weight, where=5)
    finding = find(model, batch, micro_batch_size=micro_batch_size)
    cause = "whose weight has 14 of 238 values not finite (position 5)"
    places = tuple((row, 5) for row in range(BATCH_SIZE))
    assert finding == Finding("output of wpe", cause, rows=(), places=places)


def test_scores_that_overflow_are_found_between_the_modules(batch):
    model = tiny_model()
    with torch.no_grad():
        model.h[1].attn.c_attn.weight.mul_(1e25)
    finding = find(model, batch)
    assert finding is not None
    assert finding.where == "input of h.1.attn.c_proj"
    largest = float(finding.cause.removeprefix("after values of up to "))
    assert 1e20 < largest < 1e28


def test_a_loss_that_overflows_is_found_in_its_rows(batch):
    model = tiny_model(dropout=0.0)

    def loss(idx, targets):
        return loss_of(model)(idx, targets) * (1e38 if (idx == RARE).any() else 1e-3)

    finding = find(model, batch, loss_of=loss, micro_batch_size=2)
    holds = (batch[0] == RARE).any(1).nonzero().flatten().tolist()
    assert finding is not None
    assert (finding.where, finding.rows, finding.places) == ("loss", tuple(holds), ())
    assert finding.cause.startswith("after values of up to ")


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_a_gradient_is_named_the_first_of_the_backward_pass(batch, micro_batch_size):
    model = tiny_model()
    for name in ("h.0.ln_1.bias", "h.1.attn.c_attn.weight", "wpe.weight"):
        model.get_parameter(name).register_hook(
            lambda gradient: gradient.where(gradient < 0, math.nan)
        )
    n_bad = int((gradient_of(model, batch, "h.1.attn.c_attn.weight").isnan()).sum())
    assert 0 < n_bad < 14 * 42
    finding = find(model, batch, micro_batch_size=micro_batch_size)
    assert finding is not None
    assert finding.where == "gradient of h.1.attn.c_attn.weight"
    if micro_batch_size is None:
        assert finding.cause == f"in {n_bad} of 588 values"


def gradient_of(model, batch, name):
    with torch.random.fork_rng():
        loss_of(model)(*batch).backward()
    gradient = model.get_parameter(name).grad
    model.zero_grad(set_to_none=True)
    return gradient


def test_rows_whose_gradient_alone_is_not_finite_are_found(batch):
    model = tiny_model()

    def loss(idx, targets):
        bias = model.ln_f.bias
        steep = (bias - bias.detach()).square().sum().sqrt()  # 0, its slope is infinity times 0
        return loss_of(model)(idx, targets) + (steep if (idx == RARE).any() else 0)

    finding = find(model, batch, loss_of=loss, micro_batch_size=2)
    assert finding is not None
    assert (finding.where, finding.cause) == ("gradient of ln_f.bias", "in 14 of 14 values")
    assert finding.rows == tuple((batch[0] == RARE).any(1).nonzero().flatten().tolist())


def test_a_norm_that_overflows_is_not_taken_for_a_finite_step(batch):
    model = tiny_model(dropout=0.0)
    finding = find(model, batch, loss_of=lambda *part: loss_of(model)(*part) * 1e24)
    assert finding is not None
    assert finding.where == "norm of all gradients"
    gradients = {name: gradient_of(model, batch, name) for name, _ in model.named_parameters()}
    largest = max(gradients, key=lambda name: gradients[name].abs().max())
    assert finding.cause.startswith(f"of which {largest} has values of up to ")
    assert all(p.grad is None for p in model.parameters())


def test_gradients_whose_sum_overflows_are_found(batch):
    model = tiny_model(dropout=0.0)

    def loss(idx, targets):
        return loss_of(model)(idx, targets) + model.ln_f.bias.sum() * 1e38

    assert all(gradient_is_finite(loss, row, model) for row in zip(*(p.split(1) for p in batch)))
    finding = find(model, batch, loss_of=loss, micro_batch_size=1)
    assert finding is not None
    assert (finding.where, finding.cause) == ("gradient of ln_f.bias", "in 14 of 14 values")


def gradient_is_finite(loss, row, model):
    (gradient,) = torch.autograd.grad(loss(*row), [model.ln_f.bias])
    return bool(gradient.isfinite().all())


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_a_finite_step_has_no_finding(batches, corpus, batch, step, micro_batch_size):
    finding = find(tiny_model(), batch, micro_batch_size=micro_batch_size)
    assert finding is None
    words = finding_in_words(finding, batches.spans(step), corpus.train)
    assert words.startswith("nothing was wrong when the step was repeated; the batch holds lamps")


class Adapted(nn.Module):
    """A frozen Linear and the two small ones beside it that are trained."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, 3, bias=False)
        self.lora_B = nn.Linear(3, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.lora_B(self.lora_A(x))


def test_adapters_and_frozen_weights_are_named_too(batch):
    model = tiny_model().requires_grad_(False)
    for block in model.h:
        block.attn.c_attn = Adapted(block.attn.c_attn)
    assert find(model, batch) is None
    adapted = model.h[1].attn.c_attn
    hook = adapted.lora_A.weight.register_hook(lambda gradient: gradient * math.nan)
    finding = find(model, batch)
    assert finding is not None
    assert finding.where == "gradient of h.1.attn.c_attn.lora_A.weight"
    hook.remove()
    poison(adapted.lora_B.weight)
    finding = find(model, batch)
    assert finding is not None
    assert finding.where == "output of h.1.attn.c_attn.lora_B"
    poison(model.h[0].attn.c_attn.base.bias)
    finding = find(model, batch)
    assert finding is not None
    assert finding.where == "output of h.0.attn.c_attn.base"
    assert finding.cause == "whose bias has 1 of 42 values not finite"


def test_bfloat16_is_watched_like_float32(batch):
    model = tiny_model()

    def loss(idx, targets):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_of(model)(idx, targets)

    assert find(model, batch, loss_of=loss) is None
    poison(model.h[1].mlp.c_fc.weight, where=(3, 4))
    finding = find(model, batch, loss_of=loss)
    assert finding is not None
    assert finding.where == "output of h.1.mlp.c_fc"
    assert finding.cause == "whose weight has 1 of 784 values not finite"


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_blocks_that_are_compiled_or_recomputed_are_watched(batch):
    model = tiny_model()
    poison(model.h[1].mlp.c_fc.weight, where=(3, 4))
    model.h[0].forward = functools.partial(checkpoint, model.h[0].forward, use_reentrant=False)
    model.h[1].forward = torch.compile(model.h[1].forward, backend="eager")
    loss_of(model)(*batch)  # as the step before, it ran without hooks
    finding = find(model, batch)
    assert finding is not None
    assert finding.where == "output of h.1.mlp.c_fc"
    poison(model.h[0].mlp.c_fc.weight, where=(3, 4))
    finding = find(model, batch)
    assert finding is not None
    assert finding.where == "output of h.0.mlp.c_fc"
    hook = model.h[0].mlp.c_fc.weight.register_hook(lambda gradient: gradient * math.nan)
    for block in model.h:
        poison(block.mlp.c_fc.weight, 0.1, where=(3, 4))
    finding = find(model, batch)
    assert finding is not None
    assert finding.where == "gradient of h.0.mlp.c_fc.weight"
    hook.remove()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("poisoned", ["nothing", "weight", "gradient", "error"])
def test_the_model_and_the_random_state_stay_as_they_were(batch, training, poisoned):
    model = tiny_model().train(training)
    if poisoned == "weight":
        poison(model.h[1].ln_2.weight)
    elif poisoned == "gradient":
        model.ln_f.bias.register_hook(lambda gradient: gradient * math.nan)
    loss = loss_of(model)(*batch)
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    kept = [(p.detach().clone(), p.grad.clone()) for p in model.parameters()]
    torch.manual_seed(8)
    expected = torch.rand(5)
    torch.manual_seed(8)

    def fail(idx, targets):
        raise RuntimeError("an error of the loss")

    if poisoned == "error":
        with pytest.raises(RuntimeError, match="an error of the loss"):
            find(model, batch, loss_of=fail)
    else:
        assert (find(model, batch, seed_row=torch.manual_seed) is None) == (poisoned == "nothing")
    assert torch.equal(torch.rand(5), expected)
    assert model.training == training
    for parameter, gradient, (value, value_of_gradient) in zip(model.parameters(), gradients, kept):
        assert parameter.grad is gradient
        torch.testing.assert_close(parameter.detach(), value, equal_nan=True, rtol=0, atol=0)
        torch.testing.assert_close(gradient, value_of_gradient, equal_nan=True, rtol=0, atol=0)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_every_micro_batch_has_the_randomness_of_the_step(batch):
    model, drawn = tiny_model(), []

    def loss(idx, targets):
        drawn.append((len(idx), torch.rand(()).item()))
        return loss_of(model)(idx, targets) + math.inf

    def first_number(seed):
        return torch.rand((), generator=torch.Generator().manual_seed(seed)).item()

    find(model, batch, loss_of=loss, micro_batch_size=3, seed_row=torch.manual_seed)
    assert drawn[:3] == [(3, first_number(0)), (3, first_number(3)), (1, first_number(6))]
    assert drawn[3:] == [(1, first_number(row)) for row in range(BATCH_SIZE)]


def test_without_a_seed_the_callers_randomness_is_used(batch):
    model, drawn = tiny_model(), []

    def loss(idx, targets):
        drawn.append(torch.rand(()).item())
        return loss_of(model)(idx, targets)

    torch.manual_seed(8)
    find(model, batch, loss_of=loss)
    torch.manual_seed(8)
    assert drawn == [torch.rand(()).item()]


def test_a_row_beyond_the_last_token_names_the_first_document_too(corpus):
    n_tokens = len(corpus.train.tokens)
    finding = Finding("loss", "", rows=(1,), places=())
    spans = [(0, 17), (n_tokens - 8, 17)]
    words = finding_in_words(finding, spans, corpus.train)
    assert words == "first not finite: loss; in 1 of 2 rows, from lamps0.txt and lamps5.txt"
    at_the_seam = Finding("loss", "", rows=(1,), places=((1, 8),))
    assert finding_in_words(at_the_seam, spans, corpus.train).endswith("from lamps0.txt")


def test_a_message_names_a_few_documents_and_counts_the_others(corpus):
    finding = Finding("loss", "where it overflows", rows=(), places=())
    words = finding_in_words(finding, [(0, len(corpus.train.tokens))], corpus.train)
    assert words == (
        "first not finite: loss, where it overflows; the batch holds lamps0.txt, lamps1.txt, "
        "lamps2.txt, lamps3.txt and 2 more"
    )
    words = finding_in_words(finding, [(0, int(corpus.train.documents["end"][4]))], corpus.train)
    assert words.endswith("lamps0.txt, lamps1.txt, lamps2.txt, lamps3.txt and lamps4.txt")


def test_the_report_is_json_and_says_which_rows_hold_what(batches, corpus, batch, step):
    model = tiny_model()
    poison(model.wte.weight, where=RARE)
    finding = find(model, batch)
    spans = batches.spans(step)
    made = finding_as_json(
        finding,
        batch,
        spans,
        corpus.train,
        decode=Tokenizer.gpt2(300).decode,
        step=4,
        loss=math.nan,
        grad_norm=math.inf,
        learning_rate=0.5,
    )
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    facts = {"step": 4, "loss": "nan", "grad_norm": "inf", "learning_rate": 0.5}
    assert {name: made[name] for name in facts} == facts
    assert made["where"] == "output of wte" and "(token 48)" in made["cause"]
    assert [entry["row"] for entry in made["rows"]] == [*range(BATCH_SIZE)]
    for entry, ids, (start, _) in zip(made["rows"], batch[0].tolist(), spans):
        assert entry["start"] == start
        assert entry["at_fault"] == (RARE in ids) == (entry["positions"] != [])
        assert entry["positions"] == [t for t, id in enumerate(ids) if id == RARE]
        assert entry["ids"] == ids[:24]
        assert entry["begins"] == Tokenizer.gpt2(300).decode(ids[:24])
        assert RARE not in ids or "lamps4.txt" in entry["documents"]
        assert 1 <= len(entry["documents"]) <= 2


def test_a_report_without_a_finding_says_so(batches, corpus, batch, step):
    made = finding_as_json(None, batch, batches.spans(step), corpus.train, decode=str, step=4)
    assert made["where"] is made["cause"] is None
    names = ["row", "start", "documents", "begins", "ids"]
    assert [list(entry) for entry in made["rows"]] == [names] * BATCH_SIZE
