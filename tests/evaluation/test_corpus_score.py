"""What a model makes of texts: transformers' figures, by every protocol, however work is cut."""

import json
import math
import threading
from dataclasses import replace
from fractions import Fraction
from itertools import cycle, islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoded import BYTES, EOT, random_model
from hf_models import randomised
from minigpt2 import InputError, OptionError
from minigpt2.evaluation import Score, corpus_score, evaluate, windows
from minigpt2.evaluation.corpus_score import LongRow, Part, Sums, evaluate_row
from minigpt2.evaluation.held_out_loss import mean_loss
from minigpt2.evaluation.scorer import Scorer
from minigpt2.model import GPT2
from minigpt2.system.precision import Precision
from minigpt2.system.processes import World
from minigpt2.tokenizer import Tokenizer
from minigpt2.training.batches import validation_batches

WINDOW = 34
STRIDES = [1, 17, WINDOW // 2 + 3, WINDOW, None]
TEXTS = ["", "a", "Zwei Männer in einem Boot, ein Loch darin. " * 3, "", "日本", "x" * WINDOW, "ab"]
BOTH = pytest.mark.parametrize("document_mask", [False, True])


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A folder with a model, and transformers' model in float64."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    theirs = randomised(n_positions=WINDOW, n_embd=16, n_layer=2, n_head=2).double().eval()
    theirs.save_pretrained(folder)
    return folder, theirs


@torch.no_grad()
def reference(theirs, texts, stride, document_mask):
    """What each scored token costs, one list a document."""
    documents = [[EOT, *BYTES.encode(text)] for text in texts]
    rows = documents if document_mask else [[id for document in documents for id in document]]
    nats = []
    for row in rows:
        first = 1
        for start in range(0, len(row), stride):
            read = torch.tensor([row[start : start + WINDOW]])
            logprobs = theirs(read).logits[0].log_softmax(-1)
            nats += [[]] * (start == 0)
            for at in range(first, min(start + WINDOW + 1, len(row))):
                end = row[at] == EOT
                nats = [*nats, []] if end else nats
                nats[-1] = (
                    nats[-1] if end else [*nats[-1], -float(logprobs[at - 1 - start, row[at]])]
                )
            first = max(first, start + WINDOW + 1)
    return [document for document in nats if document]


def naive_standard_error(documents):
    """Of the ratio of two means, in the textbook's form."""
    costs, lengths = np.array([sum(d) for d in documents]), np.array([len(d) for d in documents])
    loss, n = costs.sum() / lengths.sum(), len(documents)
    return math.sqrt(((costs - loss * lengths) ** 2).sum() / (n - 1) / n) / lengths.mean()


@BOTH
@pytest.mark.parametrize("stride", STRIDES)
def test_figures_are_those_of_ten_lines_with_transformers(pair, stride, document_mask):
    folder, theirs = pair
    documents = reference(theirs, TEXTS, stride or WINDOW // 2, document_mask)
    nats = math.fsum(nats for document in documents for nats in document)
    n_bytes, n_characters = len("".join(TEXTS).encode()), len("".join(TEXTS))
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        model = GPT2.from_pretrained(folder, dtype=dtype)
        score = evaluate(model, BYTES, iter(TEXTS), stride=stride, document_mask=document_mask)
        assert score.loss == pytest.approx(nats / n_bytes, rel=tolerance)
        assert score.nats == pytest.approx(nats, rel=tolerance)
        assert score.perplexity == pytest.approx(math.exp(nats / n_bytes), rel=10 * tolerance)
        assert score.bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, rel=tolerance)
        per_character = nats / math.log(2) / n_characters
        assert score.bits_per_character == pytest.approx(per_character, rel=tolerance)
        assert (score.tokens, score.bytes, score.characters) == (n_bytes, n_bytes, n_characters)
        assert score.documents == len(documents) == 5
        expected = naive_standard_error(documents)
        assert score.standard_error == pytest.approx(expected, rel=10 * tolerance)


def test_tokens_of_many_bytes_and_added_words_count_as_their_text():
    tokenizer = Tokenizer.gpt2(1000).with_words(["<|user|>", "Männer"])
    texts = ["Two Männer in a boat", "<|user|> und 日本"]
    model = random_model(vocab_size=tokenizer.vocab_size)
    score = evaluate(model, tokenizer, texts)
    assert score.bytes == sum(len(text.encode()) for text in texts)
    assert score.characters == sum(map(len, texts))
    assert score.tokens == sum(len(tokenizer.encode(text)) for text in texts) < score.characters


@BOTH
def test_end_of_text_inside_a_document_is_not_scored_and_begins_another(document_mask):
    model, ids = random_model(), BYTES.encode("a lamp, a wall")
    one = LongRow.of_documents([[*ids, EOT, EOT, *ids[:3]], ids], EOT)
    three = LongRow.of_documents([ids, [], ids[:3], ids], EOT)
    found, expected = (
        evaluate_row(model, BYTES, row, document_mask=document_mask) for row in (one, three)
    )
    assert found == expected and found.documents == 3


def test_without_end_of_text_it_is_the_held_out_loss_of_training():
    model, ids = random_model(), BYTES.encode("Zwei Männer in einem Boot. " * 5)
    batches = validation_batches(np.array([EOT, *ids]), block_size=31, batch_size=2)
    held_out = mean_loss(Scorer(model), batches, Precision(torch.device("cpu"), torch.float32))
    row = LongRow.of_documents([ids], EOT)
    assert evaluate_row(model, BYTES, row, stride=31).loss == pytest.approx(held_out, rel=1e-6)


def test_one_document_has_no_standard_error_and_of_equal_ones_it_is_0():
    model = random_model()
    assert evaluate(model, BYTES, ["one lamp"]).standard_error is None
    assert evaluate(model, BYTES, ["", "one lamp", ""]).standard_error is None
    same = evaluate(model, BYTES, ["one lamp"] * 5, document_mask=True).standard_error
    assert same is not None and same < 1e-6


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr(windows, "GROUP_TOKENS", 60)
    monkeypatch.setattr(corpus_score, "SCANNED_AT_ONCE", 7)


@BOTH
def test_it_goes_on_from_any_sums_to_the_same_figure_bit_for_bit(small_groups, document_mask):
    model, row = random_model(), LongRow.of_documents(map(BYTES.encode, TEXTS), EOT)
    kept = []
    how = {"stride": 9, "document_mask": document_mask}
    whole = evaluate_row(model, BYTES, row, **how, on_sums=kept.append)
    assert len(kept) > 5 and [sums.groups for sums in kept] == list(range(1, len(kept) + 1))
    for sums in kept:
        begun = Sums.from_json(json.loads(json.dumps(sums.to_json())))
        assert begun == sums
        later = []
        assert evaluate_row(model, BYTES, row, **how, begun=begun, on_sums=later.append) == whole
        assert len(later) == len(kept) - sums.groups


@pytest.mark.parametrize("size", [2, 3])
def test_processes_that_share_the_groups_have_the_figure_of_one(small_groups, size):
    class Together(World):
        def gather(self, value):
            values[self.rank] = value
            barrier.wait(timeout=60)
            found = [*values]
            barrier.wait(timeout=60)
            return found

    def judge(rank):
        each[rank] = evaluate_row(random_model(), BYTES, row, stride=9, world=Together(rank, size))

    values, each, barrier = [None] * size, [None] * size, threading.Barrier(size)
    row = LongRow.of_documents(map(BYTES.encode, TEXTS), EOT)
    threads = [threading.Thread(target=judge, args=[rank]) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert each == [evaluate_row(random_model(), BYTES, row, stride=9)] * size


COSTS = st.floats(0, 1e6, allow_nan=False)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.lists(COSTS, min_size=1, max_size=4), min_size=1, max_size=4),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
)
def test_sums_are_exact_wherever_documents_are_cut(documents, cuts):
    parts, place = [], 0
    for costs in documents:
        place += 1  # an end-of-text
        for cost in costs:
            parts.append(Part(place, 1, cost, 2, 1))
            place += 1
    sums, left = Sums(), iter(parts)
    for n in cycle(cuts):
        if not (group := list(islice(left, n))):
            break
        sums = sums.plus(group)
    whole = sums.closed()
    assert whole.nats == sum(Fraction(cost) for costs in documents for cost in costs)
    assert (whole.documents, whole.tokens) == (len(documents), len(parts))
    assert (whole.bytes, whole.characters) == (2 * len(parts), len(parts))
    error = whole.standard_error()
    if len(documents) == 1:
        assert error is None
    else:
        assert error == pytest.approx(naive_standard_error(documents), rel=1e-6, abs=1e-6)
    assert whole.closed() == whole


def test_the_protocol_is_told_in_a_line():
    score = Score(10.0, 5, 6, 6, 1, None, stride=512, block_size=1024, document_mask=False)
    assert score.protocol == (
        "windows of 1,024 tokens that begin 512 tokens apart; each document is read after those "
        "before it, behind an end-of-text; each token is scored once, end-of-text never"
    )
    assert "begin one token apart" in replace(score, stride=1).protocol
    assert "do not overlap" in replace(score, stride=1024).protocol
    assert "each document is read alone" in replace(score, document_mask=True).protocol


def test_a_perplexity_beyond_floats_is_inf():
    assert Score(5e3, 5, 6, 6, 1, None, 1, 1, False).perplexity == math.inf


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        ("one text", "texts is one text, allowed are several: put it into a list"),
        (5, "texts is 5, allowed are several texts"),
        (["a lamp", 5], "text is 5, allowed is one text"),
        ([], "the text has 0 tokens, needs 2 to be judged: give more text"),
        (["", ""], "the text has 0 tokens, needs 2"),
        (["", "a"], "the text has 1 token, needs 2"),
    ],
)
def test_what_are_no_texts_and_what_is_too_short_is_refused(texts, told):
    with pytest.raises(InputError, match=told):
        evaluate(random_model(), BYTES, texts)


def test_a_mask_that_is_no_truth_value_is_refused():
    with pytest.raises(InputError, match="document_mask is 'no', allowed is True or False"):
        evaluate(random_model(), BYTES, ["a lamp"], document_mask="no")


@pytest.mark.parametrize("stride", [0, 32, 1.5])
def test_another_stride_is_refused(stride):
    with pytest.raises(OptionError, match="stride is"):
        evaluate(random_model(), BYTES, ["a lamp"], stride=stride)


def test_a_name_is_no_model_and_ids_that_a_model_has_not_are_refused():
    with pytest.raises(OptionError, match="model is 'gpt2', allowed is a GPT2"):
        evaluate("gpt2", BYTES, ["a lamp"])
    with pytest.raises(InputError, match="the text holds ids from 1 to 300, the model knows 0 to"):
        evaluate_row(random_model(), BYTES, LongRow.of_documents([[1, 300]], EOT))


def test_scores_that_are_not_finite_are_told_with_their_place():
    model = random_model()
    model.ln_f.weight.fill_(math.nan)
    with pytest.raises(InputError, match="not finite between the tokens 1 and 7: use dtype float3"):
        evaluate(model, BYTES, ["a lamp"])


def test_ids_that_the_tokenizer_has_not_have_no_probability():
    padded = random_model(vocab_size=311)
    with torch.no_grad():
        logits = padded(torch.tensor([[EOT, *BYTES.encode("lam")]]))[0, :, :257].log_softmax(-1)
    expected = -sum(float(logits[at, id]) for at, id in enumerate(BYTES.encode("lamp")))
    assert evaluate(padded, BYTES, ["lamp"]).nats == pytest.approx(expected, rel=1e-5)


def test_a_text_is_read_a_part_at_a_time(monkeypatch, small_groups):
    asked, ids = [], np.array([EOT, *BYTES.encode("Zwei Männer in einem Boot. " * 20)])

    def read(start, end):
        asked.append(end - start)
        return ids[start:end]

    evaluate_row(random_model(), BYTES, LongRow(len(ids), read, EOT))
    assert max(asked) <= 60 + 2 * 31 and len(asked) > 10
