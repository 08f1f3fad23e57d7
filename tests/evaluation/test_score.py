"""What tokens cost: transformers' numbers, whatever the windows, and those of decoding."""

import math
import re

import pytest
import torch

from decoded import BYTES, MODEL, SAMPLED, random_model
from hf_models import TOLERANCE, randomised
from minigpt2 import InputError, OptionError, score
from minigpt2.decoding.cpu_layout import pack
from minigpt2.decoding.int8 import quantize
from minigpt2.decoding.text import complete
from minigpt2.evaluation import score as module
from minigpt2.evaluation.held_out_loss import mean_loss
from minigpt2.evaluation.score import score_ids
from minigpt2.evaluation.scorer import Scorer
from minigpt2.model import GPT2
from minigpt2.system.precision import Precision
from minigpt2.tokenizer import Tokenizer
from minigpt2.training.batches import validation_batches

WINDOW = 11
STRIDES = [1, 3, 5, 7, WINDOW, None]  # block_size // 2 is 5
TEXT = "Zwei Männer in einem Boot, ein Loch darin."  # 43 bytes


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Our model and transformers', both in float64, of one folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    theirs = randomised(n_positions=WINDOW, n_embd=16, n_layer=2, n_head=2).double().eval()
    theirs.save_pretrained(folder)
    return GPT2.from_pretrained(folder, dtype=torch.float64), theirs


@torch.no_grad()
def naive(logits_of, ids, stride, window=WINDOW):
    """Every token in a forward pass of its own, read from the start of the first window that
    reaches it.
    """
    stride = math.ceil(window / 2) if stride is None else stride
    nats = [None] * len(ids[:1])
    for at in range(1, len(ids)):
        start = next(start for start in range(0, len(ids), stride) if start + window >= at)
        logits = logits_of(torch.tensor([ids[start:at]]))[0, -1]
        nats.append(-float(logits.log_softmax(-1)[ids[at]]))
    return nats


def assert_close(found, expected, tolerance=TOLERANCE):
    assert [x is None for x in found] == [x is None for x in expected]
    assert found[1:] == pytest.approx(expected[1:], rel=0, abs=tolerance)


@pytest.mark.parametrize("stride", STRIDES)
def test_each_token_costs_what_transformers_says_in_the_first_window_that_reaches_it(pair, stride):
    ours, theirs = pair
    scores = score(ours, BYTES, TEXT, stride=stride)
    expected = naive(lambda idx: theirs(idx).logits, BYTES.encode(TEXT), stride)
    assert scores.nats[0] is None and len(scores.nats) == 43
    assert_close(scores.nats, expected)
    assert scores.total == pytest.approx(sum(expected[1:]), rel=1e-12)
    assert scores.mean == pytest.approx(sum(expected[1:]) / 42, rel=1e-12)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize(("most_tokens", "most_logits"), [(1, 1), (17, 600), (40, 2**25)])
def test_rows_of_any_length_cost_the_same_however_they_are_batched(
    pair, stride, most_tokens, most_logits, monkeypatch
):
    ours, _ = pair
    ids = BYTES.encode(TEXT)
    rows = [ids[:n] for n in (0, 1, 2, 10, 11, 12, 13, 22, 23, 43)]
    alone = [score_ids(ours, [row], stride=stride)[0] for row in rows]
    for row, found in zip(rows, alone):
        assert_close(found, naive(ours, row, stride))
    monkeypatch.setattr(module, "MOST_TOKENS", most_tokens)
    monkeypatch.setattr(module, "MOST_LOGITS", most_logits)
    for found, expected in zip(score_ids(ours, rows, stride=stride), alone):
        assert_close(found, expected)


def test_what_is_held_at_once_is_bounded(monkeypatch):
    model = random_model()
    seen, hidden, head = {"hidden": [], "head": []}, model.hidden, model.head
    monkeypatch.setattr(
        model, "hidden", lambda idx: seen["hidden"].append(idx.numel()) or hidden(idx)
    )
    monkeypatch.setattr(model, "head", lambda x: seen["head"].append(len(x)) or head(x))
    monkeypatch.setattr(module, "MOST_TOKENS", 100)
    monkeypatch.setattr(module, "MOST_LOGITS", 50 * 257)
    score_ids(model, [[n % 257 for n in range(500)], [1, 2, 3]], stride=31)
    assert max(seen["hidden"]) == 93 and max(seen["head"]) == 50
    assert sum(seen["head"]) == 499 + 2 and len(seen["hidden"]) == math.ceil(17 / 3)


def test_windows_that_do_not_overlap_are_those_of_the_held_out_loss():
    model = random_model()
    ids = BYTES.encode(TEXT * 3)
    batches = validation_batches(torch.tensor(ids).numpy(), block_size=31, batch_size=2)
    held_out = mean_loss(Scorer(model), batches, Precision(torch.device("cpu"), torch.float32))
    assert score(model, BYTES, TEXT * 3, stride=31).mean == pytest.approx(held_out, rel=1e-6)


def test_a_text_that_was_written_costs_what_writing_it_reported_also_past_the_window():
    (written,) = complete(MODEL, BYTES, "Ein Wort", max_new_tokens=90, sampling=SAMPLED, seed=1)
    assert len(written.ids) > 40
    (nats,) = score_ids(MODEL, [BYTES.encode("Ein Wort") + written.ids])
    assert [-x for x in nats[8:]] == pytest.approx(written.logprobs, abs=1e-4)


def test_ids_that_the_tokenizer_has_not_have_no_probability():
    model = random_model(vocab_size=311)
    expected = naive(lambda idx: model(idx)[..., :257], BYTES.encode("a lamp"), None, 31)
    assert_close(score(model, BYTES, "a lamp").nats, expected, 1e-4)
    (nats,) = score_ids(model, [[7, 300, 8]], vocab_size=257)
    assert nats[1] == math.inf and math.isfinite(nats[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_16_bits_are_summed_in_float32(dtype):
    model = random_model(dtype)
    ids = BYTES.encode("a lamp, a wall")
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0].float().log_softmax(-1)
    expected = [-float(logits[at - 1, ids[at]]) for at in range(1, len(ids))]
    assert score_ids(model, [ids])[0][1:] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "change", [[quantize], [quantize, pack], [pack]], ids=["int8", "int8-packed", "packed"]
)
def test_models_that_only_decode_score_too(change):
    model = random_model()
    for make in change:
        make(model)
    ids = BYTES.encode(TEXT)
    (found,), expected = score_ids(model, [ids]), naive(model, ids, None, 31)
    assert_close(found, expected, 0.01)  # of packed int8 the activations are rounded, too


def test_an_empty_text_has_no_tokens_and_one_token_no_score():
    empty, one = score(MODEL, BYTES, ""), score(MODEL, BYTES, "a")
    assert (empty.ids, empty.tokens, empty.nats, empty.total) == ((), (), (), 0)
    assert (one.ids, one.tokens, one.nats, one.total) == ((97 - 33,), ("a",), (None,), 0)
    assert math.isnan(empty.mean) and math.isnan(one.mean)
    assert score_ids(MODEL, []) == []


def test_tokens_are_the_ids_as_text_and_parts_of_characters_are_replacement_characters():
    assert score(MODEL, BYTES, "aé").tokens == ("a", "\ufffd", "\ufffd")
    tokenizer = Tokenizer.gpt2(1024)
    scores = score(random_model(vocab_size=1024), tokenizer, "Two men in a boat")
    assert "".join(scores.tokens) == "Two men in a boat" and len(scores.tokens) > 4
    assert list(scores.ids) == tokenizer.encode("Two men in a boat")


@pytest.mark.parametrize("stride", [0, -1, 32, 1.5, "half", True])
def test_a_stride_that_skips_tokens_or_is_none_is_refused(stride):
    with pytest.raises(OptionError, match=re.escape(f"stride is {stride!r}, allowed is")) as caught:
        score(MODEL, BYTES, "a", stride=stride)
    if stride == 32:
        assert str(caught.value).endswith("allowed is from 1 to the model's block_size, 31")


def test_what_is_no_text_and_ids_that_the_model_has_not_are_refused():
    with pytest.raises(InputError, match="text is 5, allowed is one text"):
        score(MODEL, BYTES, 5)
    with pytest.raises(InputError, match="row 1 holds ids from 3 to 257, the model knows 0 to 256"):
        score_ids(MODEL, [[1], [3, 257]])
    with pytest.raises(InputError, match="put one row into a list"):
        score_ids(MODEL, [1, 2])


def test_scores_that_are_no_numbers_are_nan():
    model = random_model()
    model.ln_f.weight.fill_(math.nan)
    assert all(map(math.isnan, score(model, BYTES, "abc").nats[1:]))


def test_scoring_leaves_mode_gradients_and_random_state_as_they_were():
    model = random_model(attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train()
    model.requires_grad_(True)
    model.h[1].eval()
    modes, before = [m.training for m in model.modules()], torch.get_rng_state()
    assert score(model, BYTES, TEXT) == score(model, BYTES, TEXT)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before) and torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())
