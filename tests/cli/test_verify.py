"""minigpt2 verify: every deliberate breakage turns an item to FAIL, and without one all are PASS or
NOT HERE.
"""

import functools
import importlib
import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import minigpt2.decoding.c_library as c_library
import minigpt2.decoding.c_products as c_products
import minigpt2.decoding.c_step as c_step
import minigpt2.decoding.cpu_layout as cpu_layout
import minigpt2.decoding.int8 as int8
import minigpt2.formats.hugging_face as hugging_face
import minigpt2.model as model_module
import minigpt2.sampling as sampling
import minigpt2.training.blocks as blocks
import minigpt2.training.c_parts as c_parts
import minigpt2.training.dropout as dropout
import minigpt2.training.loop as loop
import minigpt2.training.optimizer as optimizer
from hf_models import reference
from minigpt2.__main__ import main
from minigpt2.cache import KVCache
from minigpt2.cli import verify
from minigpt2.cli.proofs import machine, published, training
from minigpt2.cli.proofs.every import items
from minigpt2.cli.proofs.place import Place
from minigpt2.cli.proofs.published import Known
from minigpt2.cli.proofs.walk import IN_C
from minigpt2.decoding.cuda_graphs import FixedDecodeStep
from minigpt2.equivalences import WAYS
from minigpt2.evaluation.proof import Item, NotHereError, Outcome, Result, judged, run
from minigpt2.formats.activations import ACTIVATIONS
from minigpt2.formats.peft import Adapter, LoRAConfig
from minigpt2.model import GPT2, Block, CausalSelfAttention, GPT2Config
from minigpt2.tokenizer import Tokenizer

generate_module = importlib.import_module("minigpt2.generate")
LONG = {"compiled blocks", "compiled decode step", "int8 on CUDA", "DDP", "FSDP"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    made = Place(tmp_path_factory.mktemp("verify"))
    for name in ("tied", "draft", "LoRA", "peft"):
        made.model(name)
    made.text()
    return made


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    # one for all: the C function is built once
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def outcome_of(name: str, place: Place, source: str | Path = "someone/nothing") -> Outcome:
    """One item, run alone as the command runs it."""
    (item,) = (item for item in items(place, Known(source)) if item.name == name)
    return run(item)


# the items


NAMES = [item.name for item in items(Place(Path()), Known("someone/nothing"))]
QUICK = [
    name for name in NAMES if name not in LONG | {"resume"} and not name.startswith("published")
]


def test_every_row_of_the_table_of_equivalences_is_an_item():
    assert set(WAYS) <= set(NAMES) and len({*NAMES}) == len(NAMES)
    marked = {item.name for item in items(Place(Path()), Known("gpt2")) if item.long}
    assert marked == LONG | {"published steps"}


@pytest.mark.parametrize("name", QUICK)
def test_without_a_breakage_an_item_is_pass_or_not_here(place, name):
    outcome = outcome_of(name, place)
    assert outcome.status in ("PASS", "NOT HERE"), outcome.detail
    assert outcome.status == "PASS" or outcome.detail


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns of its own parts when it compiles
@pytest.mark.parametrize("name", ["resume", "compiled blocks", "DDP", "FSDP"])
def test_without_a_breakage_what_takes_longer_is_pass_or_not_here(place, name):
    outcome = outcome_of(name, place)
    assert outcome.status in ("PASS", "NOT HERE"), outcome.detail


# breakages


BREAKAGES: list[tuple[str, Callable]] = []


def breaks(*names: str):
    """Put a breakage on the list; the items must turn to FAIL with it."""

    def add(make: Callable) -> Callable:
        BREAKAGES.extend((name, make) for name in names)
        return make

    return add


def in_loaded_models(patch, change):
    load = GPT2.from_pretrained.__func__

    def from_pretrained(cls, *args, **options):
        model = load(cls, *args, **options)
        with torch.no_grad():
            change(model)
        return model

    patch.setattr(GPT2, "from_pretrained", classmethod(from_pretrained))


def in_read_tensors(patch, rename):
    opened = hugging_face.TensorFiles.open.__func__

    def other(cls, folder):
        tensors = opened(cls, folder).tensors
        return cls(folder, {name: tensors[rename(name)] for name in tensors})

    patch.setattr(hugging_face.TensorFiles, "open", classmethod(other))


@breaks("token ids")
def texts_normalised(patch):
    encode = Tokenizer.encode
    patch.setattr(
        Tokenizer, "encode", lambda self, text: encode(self, unicodedata.normalize("NFC", text))
    )


@breaks("token ids")
def texts_with_a_blank_in_front(patch):
    patch.setattr(Tokenizer, "_prefixed", lambda self, text: f" {text}")


@breaks("logits", "logits float32", "gradients")
def gelu_by_the_error_function(patch):
    patch.setitem(ACTIVATIONS, "gelu_new", F.gelu)


@breaks("logits", "greedy ids")
def head_not_tied(patch):
    patch.setattr(GPT2, "head", lambda self, x: F.linear(x, self.wte.weight.roll(1, 0)))


@breaks("logits", "AdamW")
def attention_projection_not_transposed(patch):
    patch.setattr(hugging_face, "TRANSPOSED", re.compile(r"(c_attn|c_fc|mlp\.c_proj)\.weight$"))


@breaks("logits")
def layer_norm_epsilon_of_1e_6(patch):
    read = GPT2Config.from_hf.__func__

    def from_hf(cls, given, *, where="config.json"):
        return read(cls, {**given, "layer_norm_epsilon": 1e-6}, where=where)

    patch.setattr(GPT2Config, "from_hf", classmethod(from_hf))


@breaks("logits", "logits float32")
def attention_not_scaled(patch):
    def change(model):
        for block in model.h:
            block.attn.scale = 1.0

    in_loaded_models(patch, change)


@breaks("logits")
def layers_in_the_order_of_their_names_as_text(patch):
    order = sorted(map(str, range(12)))
    in_read_tensors(
        patch, lambda name: re.sub(r"^h\.(\d+)", lambda part: f"h.{order[int(part[1])]}", name)
    )


@breaks("logits")
def layer_norms_of_a_block_swapped(patch):
    other = {".ln_1.": ".ln_2.", ".ln_2.": ".ln_1."}
    in_read_tensors(patch, lambda name: re.sub(r"\.ln_.\.", lambda part: other[part[0]], name))


@breaks("logits")
def layer_norm_after_the_sublayer(patch):
    def forward(self, x, mask, cache):
        x = self.ln_1(x + self.attn(x, mask, cache))
        return self.ln_2(x + self.mlp(x))

    patch.setattr(Block, "forward", forward)


@breaks("logits", "greedy ids")
def the_next_token_seen(patch):
    def attend(self, q, k, v, mask):
        allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=self.scale)

    patch.setattr(CausalSelfAttention, "attend", attend)


@breaks("logits", "logits float32")
def float16_accumulation(patch):
    def forward(self, x):
        bias = None if self.bias is None else self.bias.half()
        return F.linear(x.half(), self.weight.half(), bias).to(x.dtype)

    patch.setattr(torch.nn.Linear, "forward", forward)


@breaks("evaluation mode")
def dropout_left_on(patch):
    in_loaded_models(patch, lambda model: model.train())


@breaks("gradients", "AdamW")
def attention_detached(patch):
    attend = CausalSelfAttention.attend
    patch.setattr(
        CausalSelfAttention,
        "attend",
        lambda self, q, k, v, mask: attend(self, q.detach(), k, v, mask),
    )


@breaks("sampling filters")
def the_token_that_crosses_p_left_out(patch):
    def top_p(logits, p):
        values, order = logits.sort(dim=-1, descending=True)
        dropped = values.softmax(dim=-1).cumsum(dim=-1) > p
        dropped[..., 0] = False
        return logits.masked_fill(dropped.scatter(-1, order, dropped), float("-inf"))

    patch.setattr(sampling, "top_p", top_p)


@breaks("sampling filters")
def every_score_divided_by_the_penalty(patch):
    def penalty(logits, texts, penalty):
        logits = logits.clone()
        for row, text in zip(logits, texts):
            row[list(set(text))] /= penalty
        return logits

    patch.setattr(sampling, "repetition_penalty", penalty)


@breaks("sampling filters")
def temperature_after_the_filters(patch):
    temperature = sampling.temperature
    patch.setattr(sampling, "temperature", lambda logits, t: logits)
    min_p = sampling.min_p
    patch.setattr(sampling, "min_p", lambda logits, p: temperature(min_p(logits, p), 2.0))


@breaks("cache", "prompt in parts", "greedy ids")
def positions_restart_with_every_call(patch):
    patch.setattr(
        KVCache, "positions", lambda self, n: torch.arange(n).expand(len(self.lengths), n)
    )


@breaks("rows of different length")
def mask_of_the_longest_row(patch):
    mask = KVCache.mask
    patch.setattr(KVCache, "mask", lambda self, positions: mask(self, positions.amax(0)[None]))


@breaks("documents apart")
def documents_see_each_other(patch):
    apart = model_module._apart

    def other(documents):
        positions, mask = apart(documents)
        return positions, torch.ones_like(mask).tril()

    patch.setattr(model_module, "_apart", other)


@breaks("deferred weights")
def head_of_deferred_weights_off_by_a_row(patch):
    skeleton = model_module.skeleton

    def shifted(folder, *, own_head=False, **options):
        model, files = skeleton(folder, own_head=own_head, **options)
        if own_head:
            head = files.tensors[hugging_face.HEAD]
            files.tensors[hugging_face.HEAD] = head._replace(read=lambda: head.read().roll(1, 0))
        return model, files

    patch.setattr(model_module, "skeleton", shifted)


@breaks("packed float32")
def packed_biases_forgotten(patch):
    init = cpu_layout.PackedLinear.__init__

    def without(self, linear):
        init(self, linear)
        self.bias = None

    patch.setattr(cpu_layout.PackedLinear, "__init__", without)


@breaks("plain float32", "sliced float32")
def plain_biases_forgotten(patch):
    init = cpu_layout.PlainLinear.__init__

    def without(self, linear):
        init(self, linear)
        self.bias = None

    patch.setattr(cpu_layout.PlainLinear, "__init__", without)


@breaks("int8")
def int8_scales_of_the_row_before(patch):
    def shifted(weight, round_rows=int8.round_rows):
        steps, scale = round_rows(weight)
        return steps, scale.roll(1)

    patch.setattr(int8, "round_rows", shifted)


@breaks("packed int8")
def int8_activations_cut_off(patch):
    patch.setattr(cpu_layout, "ZERO_POINT", 220)


def transposed(self, x):
    """The product of a matrix that lies the other way round."""
    turned = self.weight.T.contiguous().view(self.weight.shape).to(x.dtype)
    y = F.linear(x, turned) * (1 if self.scale is None else self.scale)
    return y if self.bias is None else y + self.bias


@breaks("int8 in C")
def int8_matrices_read_transposed(patch):
    patch.setattr(c_products.CLinear, "forward", transposed)


@breaks("int8 in C")
def int8_matrices_read_transposed_after_the_look_at_them(patch):
    patch.setattr(c_products.CLinear, "forward", transposed)
    patch.setattr(cpu_layout, "c_works", lambda dtype: True)


@breaks("float32 in C", "float16 in C")
def heads_in_c_read_transposed_after_the_look_at_them(patch):
    patch.setattr(c_products.CLinear, "forward", transposed)
    patch.setattr(cpu_layout, "c_works", lambda dtype: True)


@breaks("decode step in C")
def the_second_layer_norm_of_the_step_in_c_forgotten(patch):
    block_of = c_step._block

    def swapped(block):
        found = block_of(block)
        found.ln_2 = found.ln_1
        return found

    patch.setattr(c_step, "_block", swapped)


@breaks("bfloat16")
def weights_of_two_bits(patch):
    load = hugging_face.fill

    def fill(model, files, **options):
        load(model, files, **options)
        if options["dtype"] == torch.bfloat16:
            for parameter in model.parameters():
                parameter.data = (parameter.data * 4).round() / 4

    patch.setattr(hugging_face, "fill", fill)


@breaks("fixed shapes")
def positions_of_the_first_row_in_fixed_shapes(patch):
    def first(self, idx, positions, cache, run=FixedDecodeStep._run):
        return run(self, idx, positions[:1].expand_as(positions), cache)

    patch.setattr(FixedDecodeStep, "_run", first)


@breaks("LoRA beside", "LoRA folded", "peft's adapter")
def lora_scale_ignored(patch):
    patch.setattr(LoRAConfig, "scale", property(lambda self: 1.0))


@breaks("LoRA folded")
def lora_folded_twice(patch):
    def twice(self, name, weight, folded=Adapter.folded):
        return folded(self, name, folded(self, name, weight))

    patch.setattr(Adapter, "folded", twice)


@breaks("guesses from the text", "guesses of a draft model")
def every_guess_kept(patch):
    def kept(guesses, probs, generators):
        return [[*guess.ids, int(p[len(guess.ids)].argmax())] for guess, p in zip(guesses, probs)]

    patch.setattr(generate_module, "accept", kept)


@breaks("AdamW")
def biases_decayed(patch):
    def make(model, *, learning_rate, weight_decay):
        return torch.optim.AdamW(
            model.parameters(), learning_rate, (0.9, 0.95), weight_decay=weight_decay
        )

    patch.setattr(training, "make_optimizer", make)


@breaks("AdamW")
def betas_of_torch(patch):
    patch.setattr(optimizer, "BETAS", (0.9, 0.999))


@breaks("AdamW")
def gradients_not_clipped(patch):
    clip = torch.nn.utils.clip_grad_norm_
    patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, norm: clip(p, float("inf")))


@breaks("AdamW")
def learning_rate_that_stays(patch):
    patch.setattr(training, "lr_at", lambda step, *, peak, **_: peak)


@breaks("micro-batches")
def gradient_of_the_last_micro_batch_alone(patch):
    forward = training.Scorer.forward

    def forgets(self, *given):
        self.zero_grad()
        return forward(self, *given)

    patch.setattr(training.Scorer, "forward", forgets)


@breaks("loss in chunks")
def last_chunk_of_the_loss_left_out(patch):
    summed = training.summed_loss

    def shorter(x, weight, targets, **options):
        targets = targets.flatten().clone()
        targets[-7:] = -100
        return summed(x, weight, targets, **options)

    patch.setattr(training, "summed_loss", shorter)


@breaks("16-bit dropout")
def dropped_probabilities_of_other_scores(patch):
    probs = dropout._probs

    def other(q, k, mask, scale, *part):
        return probs(q, k, mask, 1.1 * scale, *part)

    patch.setattr(dropout, "_probs", other)


@breaks("training in C")
def a_slope_of_gelu_in_c_that_is_too_steep(patch):
    gradient = c_parts.biased_gelu_gradient

    def steeper(grad, u):
        return gradient(1.1 * grad, u)

    patch.setattr(c_parts, "biased_gelu_gradient", steeper)


@breaks("recomputed blocks")
def recomputed_blocks_with_other_dropout(patch):
    patch.setattr(
        blocks, "checkpoint", functools.partial(blocks.checkpoint, preserve_rng_state=False)
    )


@breaks("bfloat16 autocast")
def loss_scaled_in_bfloat16_only(patch):
    accumulate = importlib.import_module("minigpt2.training.step").accumulate

    def other(scorer, batch, precision, *rest):
        share = 1.05 if precision.dtype == torch.bfloat16 else 1.0
        return accumulate(scorer, batch, precision, *rest) * share

    patch.setattr("minigpt2.training.step.accumulate", other)


MAY_LACK = (
    "packed float32",
    "packed int8",
    "training in C",
    *IN_C,
)  # of a processor, or a compiler


def test_there_are_many_breakages_and_those_that_matter():
    assert len({make for _, make in BREAKAGES}) >= 30


@pytest.mark.parametrize(
    ("name", "make"),
    BREAKAGES,
    ids=lambda value: getattr(value, "__name__", None) or value.replace(" ", "-"),
)
def test_a_breakage_turns_its_item_to_fail(place, monkeypatch, name, make):
    if name in MAY_LACK and outcome_of(name, place).status == "NOT HERE":
        pytest.skip(f"{name} is not to be had on this machine")
    make(monkeypatch)
    outcome = outcome_of(name, place)
    c_library.library.cache_clear()
    assert outcome.status == "FAIL", outcome
    assert outcome.detail and "\n" not in outcome.detail


@pytest.mark.slow
def test_a_resume_without_what_adamw_remembers_is_a_fail(place, monkeypatch):
    monkeypatch.setattr(loop, "load_optimizer_tensors", lambda *_: None)
    outcome = outcome_of("resume", place)
    if outcome.status == "NOT HERE":
        pytest.skip(outcome.detail)
    assert outcome.status == "FAIL" and "after a kill at step" in outcome.detail


# published figures, on a made model with transformers' figures for it


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder, and what transformers says of it."""
    from hf_models import randomised

    folder = tmp_path_factory.mktemp("made")
    randomised(vocab_size=300, n_positions=128, n_layer=3, seed=5).save_pretrained(folder)
    Tokenizer.gpt2(300).save(folder)
    words, theirs = Tokenizer.from_pretrained(folder), reference(folder, torch.float32).eval()
    theirs.generation_config.eos_token_id = None
    first = words.encode("The dog")
    idx = torch.tensor([first])
    greedy = theirs.generate(
        idx, attention_mask=torch.ones_like(idx), max_new_tokens=18, do_sample=False
    )
    ids = torch.tensor([[words.eot, *words.encode("Hello world!")]])
    with torch.no_grad():
        hello = theirs(ids, labels=ids).loss.item()
    figures = published.Figures(
        n_parameters=sum(p.numel() for p in theirs.parameters()),
        first=tuple(first),
        greedy=tuple(greedy[0].tolist()),
        hello=hello,
        steps=llm_c_losses(theirs, published.shakespeare(words, 257)),
    )
    return folder, figures


def llm_c_losses(model, ids):
    """Ten losses as llm.c's test makes them, with torch's plain AdamW."""
    x, y = torch.tensor(ids[:-1]).view(4, 64), torch.tensor(ids[1:]).view(4, 64)
    adamw = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, foreach=False
    )
    losses = []
    for _ in range(10):
        loss = F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        losses.append(loss.item())
    assert losses[0] - losses[-1] > 0.1, "it learns too little to show anything"
    return tuple(losses)


PUBLISHED = ("published text", "published loss", "published steps")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures_are_found_on_a_made_model(made, place, name):
    folder, figures = made
    (item,) = (item for item in published.items(Known(folder, figures)) if item.name == name)
    assert run(item).status == "PASS", run(item).detail


@pytest.mark.parametrize("name", PUBLISHED)
def test_other_weights_are_a_fail(made, place, name):
    folder, figures = made
    greedy = (*figures.greedy[:-1], figures.greedy[-1] + 1)
    steps = (*figures.steps[:-1], figures.steps[-1] + 0.02)
    other = replace(figures, greedy=greedy, hello=figures.hello + 1e-4, steps=steps)
    (item,) = (item for item in published.items(Known(folder, other)) if item.name == name)
    assert run(item).status == "FAIL"


def test_a_model_of_another_size_is_told(made, place):
    outcome = outcome_of("published loss", place, made[0])
    assert outcome.status == "FAIL" and "124,439,808" in outcome.detail


def test_llm_cs_first_tokens_are_those_of_its_rule():
    ids = published.shakespeare(Tokenizer.gpt2(), 257)
    assert ids[:4] == [50256, 5962, 22307, 25] and len(ids) == 257
    text = Tokenizer.gpt2().decode(ids)
    assert text.startswith("<|endoftext|>First Citizen:\nBefore we proceed any further")
    assert "\n\n<|endoftext|>All:\nSpeak, speak.\n\n<|endoftext|>" in text


# the command


def done(capsys, *words):
    capsys.readouterr()
    code = main(["verify", *words])
    return code, *capsys.readouterr()


def test_the_command_tells_each_item_the_machine_and_what_to_paste(capsys):
    code, out, err = done(capsys, "--item", "sampling filters", "logits")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert re.fullmatch(r"PASS      logits  \(\d+\.\d s\)", lines[0])
    assert lines[1].startswith("PASS      sampling filters  (")
    assert {line.split()[0] for line in lines[3:-2]} == {*machine.machine()}
    assert lines[-1].startswith("minigpt2 0.") and lines[-1].endswith("2 PASS, 0 FAIL, 0 NOT HERE")


def test_a_fail_is_told_with_what_was_found_and_expected(capsys, monkeypatch):
    gelu_by_the_error_function(monkeypatch)
    code, out, _ = done(capsys, "--item", "logits", "sampling filters")
    assert code == 1
    assert re.search(r"^FAIL      logits  \(.*s\): found .* expected 1e-09 at most$", out, re.M)
    assert out.splitlines()[-1].endswith("| 1 PASS, 1 FAIL, 0 NOT HERE | FAIL: logits")


def test_json_is_one_object(capsys):
    code, out, _ = done(capsys, "--item", "logits", "logits CUDA", "--json")
    told = json.loads(out)
    assert code == 0 and out.count("\n") == 1 and told["ok"] is True
    assert [item["name"] for item in told["items"]] == ["logits", "logits CUDA"]
    assert set(told["items"][0]) == {"name", "proves", "status", "detail", "seconds"}
    assert told["machine"]["torch"].startswith(torch.__version__)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--item", "logit"],
            "there is no item 'logit' (did you mean logits?): token ids, logits,",
        ),
        (["--model", "no/where/else"], "there is no folder 'no/where/else'"),
        (["--model", "someone/nothing"], "someone/nothing is not in the Hub's cache"),
    ],
)
def test_what_is_not_there_is_a_line(capsys, monkeypatch, tmp_path, words, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    code, out, err = done(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}") and err.count("\n") == 1


def test_what_takes_longer_waits_for_full_or_its_name(place, monkeypatch):
    ran = []
    long = Item("long", "", lambda: ran.append("long") or judged(True, 1, 1), long=True)
    monkeypatch.setattr("minigpt2.cli.proofs.every.items", lambda *_: [long])
    for words, status in (
        [{}, "NOT HERE"],
        [{"full": True}, "PASS"],
        [{"item": ("long",)}, "PASS"],
    ):
        options = verify.VerifyOptions(**words)
        (outcome,) = verify.proved(options, place.folder, Known("gpt2"))
        assert outcome.status == status
    assert ran == ["long", "long"]


def test_a_missing_compiler_is_not_here(place, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    outcome = outcome_of("int8 in C", place)
    c_library.library.cache_clear()
    assert outcome.status == "NOT HERE" and "C compiler" in outcome.detail


def test_without_gpt2s_weights_it_is_said_how_to_get_them(place, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    outcome = outcome_of("published text", place, "gpt2")
    assert outcome.status == "NOT HERE" and "minigpt2 sample --model gpt2" in outcome.detail
    assert not any(tmp_path.iterdir())


def test_no_item_says_more_than_a_line():
    outcome = Outcome("x", "", "FAIL", "found " + "1, " * 1000, 0.0)
    assert len(verify.line_of(outcome)) < 700
    assert Result("PASS").detail == "" and issubclass(NotHereError, Exception)
