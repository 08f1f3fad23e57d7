"""Decode steps in fixed shapes give the text of those in growing ones."""

import gc
import weakref
from typing import ClassVar

import pytest
import torch

from hf_models import randomise
from minigpt2.decoding import cuda_graphs as graphs
from minigpt2.decoding.cuda_graphs import FixedDecodeStep, fix_shapes
from minigpt2.decoding.drafters import NGramDrafter
from minigpt2.decoding.int8 import quantize
from minigpt2.decoding.text import stream_text
from minigpt2.generate import generate
from minigpt2.model import GPT2, GPT2Config
from minigpt2.sampling import SamplingConfig
from minigpt2.tokenizer import Tokenizer

GREEDY = SamplingConfig(temperature=0)


def two_models():
    models = []
    for _ in range(2):
        model = GPT2(GPT2Config(vocab_size=257, block_size=31, n_embd=34, n_layer=3, n_head=2))
        randomise(model, std=0.4)
        models.append(model.eval().requires_grad_(False))
    return models


ROWS = [torch.randint(257, (n,), generator=torch.Generator().manual_seed(n)).tolist()
        for n in (5, 1, 29, 40)]  # fmt: skip


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(temperature=0.8)], ids=str)
@pytest.mark.parametrize("n_rows", [1, 4])
def test_fixed_shapes_give_the_same_text_over_three_windows(sampling, n_rows):
    plain, fixed = two_models()
    fix_shapes(fixed)
    options = {"max_new_tokens": 95, "sampling": sampling, "seed": 3, "stop_ids": [7, 9]}
    assert generate(fixed, ROWS[:n_rows], **options) == generate(plain, ROWS[:n_rows], **options)


def test_guesses_are_checked_in_their_own_shapes():
    plain, fixed = two_models()
    fix_shapes(fixed)
    drafter = NGramDrafter(shortest=1)
    ids = [generate(model, ROWS, max_new_tokens=60, sampling=GREEDY, drafter=drafter)
           for model in (plain, fixed)]  # fmt: skip
    assert ids[0] == ids[1]


def test_the_shapes_stay_the_same_while_the_text_grows(monkeypatch):
    _, model = two_models()
    fix_shapes(model)
    seen, read = [], model.read

    def spy(idx, positions, mask, layers):
        seen.append((idx.shape, positions.shape, mask if mask is None else mask.shape,
                     layers[0].n_slots))  # fmt: skip
        return read(idx, positions, mask, layers)

    monkeypatch.setattr(model, "read", spy)
    generate(model, [[5, 6]], max_new_tokens=20, sampling=GREEDY)
    assert len(seen) == 20 and len(set(seen[1:])) == 1


def test_caches_get_room_in_large_steps_and_never_beyond_the_window():
    model = GPT2(GPT2Config(vocab_size=5, block_size=700, n_embd=2, n_layer=1, n_head=1))
    fix_shapes(model)
    rooms = [model.make_cache(1, capacity=n).capacity for n in (1, 256, 257, 600, 900)]
    assert rooms == [256, 256, 512, 700, 700]
    assert model.make_cache(1).capacity == 700


def test_training_and_reading_without_a_cache_go_the_plain_way():
    plain, fixed = two_models()
    fix_shapes(fixed)
    idx = torch.tensor([[3, 5, 8]])
    assert torch.equal(fixed(idx), plain(idx))
    documents = torch.tensor([[0, 1, 1]])
    assert torch.equal(
        fixed.hidden(idx, documents=documents), plain.hidden(idx, documents=documents)
    )


@pytest.mark.parametrize("rounded", [False, True])
def test_a_compiled_reading_says_the_same(rounded, monkeypatch):
    plain, fixed = two_models()
    for model in (plain, fixed) if rounded else ():
        quantize(model)
    compiles = []
    compile_ = torch.compile

    def eager(function, **options):  # the tracing is genuine, the machine code is not awaited
        compiles.append(options)
        return compile_(function, backend="eager", fullgraph=True, **options)

    monkeypatch.setattr(torch, "compile", eager)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # other tests compile, too
    fix_shapes(fixed, compiled=True)
    expected = generate(plain, [[5, 6]], max_new_tokens=90, sampling=GREEDY)
    assert generate(fixed, [[5, 6]], max_new_tokens=90, sampling=GREEDY) == expected
    assert compiles == [{"dynamic": False}]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    torch._dynamo.reset()


class OnTheCPU:
    """What `Recording` does, without a graph: the tensors are kept, and read again."""

    made: ClassVar[list] = []

    def __init__(self, read, idx, positions, cache):
        self.idx, self.positions = idx.clone(), positions.clone()
        self.read, self.cache = read, weakref.ref(cache)
        OnTheCPU.made.append(weakref.ref(self))

    def replay(self, idx, positions):
        self.idx.copy_(idx)
        self.positions.copy_(positions)
        return self.read(self.idx, self.positions, self.cache())


class Off(OnTheCPU):
    def replay(self, idx, positions):
        return super().replay(idx, positions) * 1.01


@pytest.fixture
def recorded(monkeypatch):
    """The two models, the second one as on CUDA."""
    plain, fixed = two_models()
    fix_shapes(fixed)
    reading = fixed.hidden

    def hidden(idx, cache=None, documents=None):
        if cache is None or idx.shape[1] != 1:
            return reading(idx, cache, documents)
        read = reading._replayed if reading._records else reading._read
        x = read(idx, cache.positions(1), cache)
        cache.advance(1)
        return x

    fixed.hidden = hidden
    monkeypatch.setattr(graphs, "Recording", OnTheCPU)
    OnTheCPU.made = []
    return plain, fixed


@pytest.mark.parametrize("n_rows", [1, 4])
def test_a_recorded_reading_gives_the_same_text_over_three_windows(recorded, n_rows):
    plain, fixed = recorded
    options = {"max_new_tokens": 95, "sampling": GREEDY, "stop_ids": [7, 9]}
    assert generate(fixed, ROWS[:n_rows], **options) == generate(plain, ROWS[:n_rows], **options)
    assert OnTheCPU.made


def test_texts_that_take_turns_keep_their_recordings_and_take_them_along(recorded):
    plain, fixed = recorded
    tokenizer = Tokenizer.gpt2(257)
    texts = [list(stream_text(plain, tokenizer, text, max_new_tokens=20)) for text in ("a", "bc")]
    streams = [stream_text(fixed, tokenizer, text, max_new_tokens=20) for text in ("a", "bc")]
    found = list(zip(*streams))
    assert [*zip(*found)] == [*map(tuple, texts)]
    assert len(OnTheCPU.made) == 2
    del streams
    gc.collect()
    assert [made() for made in OnTheCPU.made] == [None, None]


def test_a_cache_that_is_read_once_is_not_recorded(recorded):
    plain, fixed = recorded
    drafter = NGramDrafter(shortest=1)
    options = {"max_new_tokens": 60, "sampling": GREEDY}
    expected = generate(plain, ROWS, **options)
    assert generate(fixed, ROWS, drafter=drafter, **options) == expected
    assert len(OnTheCPU.made) <= 2


@pytest.mark.parametrize("trouble", ["refused", "other numbers"])
def test_where_no_graph_can_be_recorded_the_reading_is_run_as_it_is(
    recorded, trouble, monkeypatch, caplog
):
    def refused(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(graphs, "Recording", refused if trouble == "refused" else Off)
    plain, fixed = recorded
    options = {"max_new_tokens": 20, "sampling": GREEDY}
    assert generate(fixed, ROWS[:1], **options) == generate(plain, ROWS[:1], **options)
    reasons = [record.getMessage() for record in caplog.records if record.name == graphs.__name__]
    expected = "when stream is capturing" if trouble == "refused" else "it is off by 1.0e-02 of the"
    assert expected in reasons[0] and reasons[0].endswith("going on without")
    assert trouble != "other numbers" or len(OnTheCPU.made) == 1


@pytest.mark.gpu
def test_a_recorded_reading_says_the_same_on_cuda():
    plain, fixed = (model.cuda() for model in two_models())
    fix_shapes(fixed)
    for rows in (ROWS[:1], ROWS):
        expected = generate(plain, rows, max_new_tokens=95, sampling=GREEDY)
        assert generate(fixed, rows, max_new_tokens=95, sampling=GREEDY) == expected
    assert isinstance(fixed.hidden, FixedDecodeStep)
