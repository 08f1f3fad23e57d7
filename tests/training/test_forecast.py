"""What a training step is forecast to need, against what autograd and the allocator say."""

import json
import logging
import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minigpt2.evaluation.scorer import Scorer
from minigpt2.formats.activations import ACTIVATIONS
from minigpt2.lora import add_lora
from minigpt2.model import GPT2, PRESETS, GPT2Config
from minigpt2.system.precision import Precision
from minigpt2.training.blocks import prepare_blocks
from minigpt2.training.forecast import (
    MemoryForecast,
    MicroBatch,
    estimate_seconds,
    fitting_micro_batch,
    forecast_in_words,
    forecast_memory,
    measured_speed,
)
from minigpt2.training.optimizer import make_optimizer
from minigpt2.training.step import train_step
from minigpt2.training.ways import IN_C, PLAIN, QUICK_DROPOUT, go
from tiny_training import needs_c

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# pairwise different sizes, so that no two kinds of tensor are taken for one another
SMALL = GPT2Config(vocab_size=1511, block_size=67, n_embd=42, n_layer=3, n_head=3)
WAYS_IN = {
    torch.float32: [PLAIN, QUICK_DROPOUT, IN_C],
    torch.bfloat16: [PLAIN, QUICK_DROPOUT],
}


def in_every_way(names, cases):
    """Parametrise by cases, of which one name is dtype, and by the ways that each can be computed
    in.
    """
    at = names.index("dtype")
    params = [
        pytest.param(*case, way, marks=[needs_c] * (way == IN_C))
        for case in cases
        for way in WAYS_IN[case[at]]
    ]
    return pytest.mark.parametrize((*names, "way"), params, ids=str)


NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}


def kept_by_autograd(config, n_rows, dtype, masked, way):
    """Bytes that autograd keeps of one block, but its weights."""
    model = GPT2(replace(config, n_layer=1)).train()
    go(model, way)
    block = model.h[0]
    weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    kept, alive = {}, []

    def keep(tensor):
        alive.append(tensor)  # a freed address could be given out again
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = 1 * torch.randn(n_rows, 61, config.n_embd, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    mask = torch.ones(n_rows, 1, 61, 61, dtype=torch.bool).tril() if masked else None
    if mask is not None:
        weights.add(mask.untyped_storage().data_ptr())  # one for all blocks
    with hooks, Precision(CPU, dtype).autocast():
        block(x, mask, None)
    return sum(kept.values())


@in_every_way(("dtype",), [(torch.float32,), (torch.bfloat16,)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n_rows", [1, 5])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        NO_DROPOUT,
        NO_DROPOUT | {"attn_pdrop": 0.1},
        NO_DROPOUT | {"resid_pdrop": 0.1},
        NO_DROPOUT | {"n_inner": 97},
        *(NO_DROPOUT | {"activation_function": name} for name in ACTIVATIONS),
        NO_DROPOUT | {"reorder_and_upcast_attn": True},
        {"reorder_and_upcast_attn": True},
    ],
    ids=str,
)
def test_a_block_keeps_exactly_the_bytes_that_autograd_keeps(changes, dtype, n_rows, masked, way):
    config = replace(SMALL, **changes)
    batch = MicroBatch(config, n_rows, 61, dtype, CPU, masked, way)
    assert sum(batch.kept) == kept_by_autograd(config, n_rows, dtype, masked, way)


def test_masks_of_a_byte_for_each_score_that_is_made_are_less_than_torch_keeps():
    config = GPT2Config()
    quick = MicroBatch(config, 4, 1024, torch.float32, CPU, way=QUICK_DROPOUT)
    made = 1024**2 * (1 + 1 / 8) / 2  # of 8 x 8 parts those on and below the diagonal
    assert sum(quick.masks) == 4 * 12 * made
    plain = MicroBatch(config, 4, 1024, torch.float32, CPU)
    assert sum(plain.kept) - sum(quick.kept) > 4 * 12 * 1024**2 * 11


def peak_of_tensors(step, path):
    """The most bytes of tensors that lived at once during `step`, beyond those from before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    profile.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"
    )
    live = most = 0
    for _, change in changes:
        live += change
        most = max(most, live)
    return most


# torch 2.10 says of every profile that its events are cleared
@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
@pytest.mark.parametrize("n_parts", [1, 3])
@in_every_way(
    ("changes", "dtype", "recomputed", "rank", "shape"),
    [
        ({}, torch.float32, False, 0, (4, 61)),
        (NO_DROPOUT, torch.float32, False, 0, (4, 61)),
        ({}, torch.bfloat16, False, 0, (4, 61)),
        ({}, torch.float32, True, 0, (4, 61)),
        ({}, torch.bfloat16, True, 0, (4, 61)),
        ({}, torch.float32, False, 2, (4, 61)),
        ({}, torch.float32, True, 2, (4, 61)),
        ({"vocab_size": 50021}, torch.float32, False, 0, (4, 61)),
        ({"vocab_size": 50021}, torch.bfloat16, False, 0, (4, 61)),
        ({"tie_word_embeddings": False}, torch.float32, False, 0, (4, 61)),
        ({"tie_word_embeddings": False, "vocab_size": 50021}, torch.float32, False, 0, (4, 61)),
        # fewer tokens than C: tightest at the embedding's gradient
        ({"vocab_size": 50021}, torch.float32, False, 0, (1, 5)),
        ({"vocab_size": 50021, "tie_word_embeddings": False}, torch.float32, False, 0, (1, 5)),
        ({"n_layer": 11}, torch.float32, False, 0, (4, 61)),
        ({"n_layer": 11}, torch.float32, True, 0, (4, 61)),
    ],
)
def test_a_step_takes_the_tensors_that_were_forecast(
    tmp_path, changes, dtype, recomputed, rank, shape, n_parts, way
):
    config, (n_rows, row) = replace(SMALL, **changes), shape
    model = GPT2(config).train()
    if rank:
        add_lora(model, rank=rank, alpha=1.0)
    precision = Precision(CPU, dtype)
    go(model, way)
    prepare_blocks(model, precision, shape, compiled=False, recomputed=recomputed)
    optimizer = make_optimizer(model, learning_rate=1e-4, weight_decay=0.1)
    idx = torch.randint(config.vocab_size, (n_rows * n_parts, row))
    step = partial(
        train_step,
        Scorer(model),
        (idx, idx),
        optimizer,
        precision,
        micro_batch_size=n_rows,
        learning_rate=1e-4,
        grad_clip=1.0,
        seed=1,
    )
    step()  # AdamW's averages are made in the first
    measured = peak_of_tensors(step, tmp_path / "trace.json")
    need = forecast_memory(
        config,
        micro_batch_size=n_rows,
        block_size=row,
        dtype=dtype,
        device=CPU,
        activation_checkpointing=recomputed,
        n_trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        accumulated=n_parts > 1,
        way=way,
    )
    assert need.weights == 4 * sum(p.numel() for p in model.parameters())
    averages = [
        value.nbytes
        for state in optimizer.state.values()
        for key, value in state.items()
        if key != "step"
    ]
    assert need.optimizer == sum(averages)
    assert need.gradients + need.activations + need.logits == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("n_inner", [None, 97])
def test_parameters_are_counted_without_a_model(tied, n_inner):
    config = replace(SMALL, tie_word_embeddings=tied, n_inner=n_inner)
    model = GPT2(config)
    assert config.n_parameters == sum(p.numel() for p in model.parameters())
    assert config.block_parameters == sum(p.numel() for p in model.h[0].parameters())


def forecast_of_124m(*, config=PRESETS["gpt2"], **changes):
    usual: dict[str, Any] = {
        "micro_batch_size": 4,
        "block_size": 1024,
        "dtype": torch.float32,
        "device": CPU,
    }
    return forecast_memory(config, **(usual | changes))


def test_a_forecast_follows_from_the_published_sizes():
    need = forecast_of_124m()
    assert need.weights == need.gradients == 4 * 124_439_808
    assert need.optimizer == 8 * 124_439_808
    assert need.total == sum(
        [need.weights, need.gradients, need.optimizer, need.activations, need.logits, need.overhead]
    )


@pytest.mark.parametrize(
    "less",
    [
        {"micro_batch_size": 3},
        {"block_size": 1023},
        {"activation_checkpointing": True},
        {"n_trained": 1_000_000},
        {"n_shards": 8},
        {"accumulated": False},
        {"device": CUDA},
        {"device": torch.device("mps")},
        {"config": PRESETS["distilgpt2"]},
        {"config": replace(PRESETS["gpt2"], **NO_DROPOUT)},
    ],
    ids=str,
)
def test_what_needs_less_is_forecast_to_need_less(less):
    assert forecast_of_124m(**less).total < forecast_of_124m().total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_kept_apart_cost_a_mask_of_numbers_in_every_layer_that_is_remembered(dtype):
    usual = {"device": CUDA, "dtype": dtype}
    more = forecast_of_124m(**usual, masked=True).total - forecast_of_124m(**usual).total
    assert more == 4 * 1024**2 * (1 + 12 * dtype.itemsize)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_cuda_holds_no_scores_and_a_byte_for_each_dropped_number(p):
    """From torch's sources: fused attention has dropout there, and masks are bool."""
    config = replace(SMALL, embd_pdrop=p, attn_pdrop=p, resid_pdrop=p)
    plain = replace(SMALL, **NO_DROPOUT)
    kept = sum(MicroBatch(config, 5, 61, torch.bfloat16, CUDA).kept)
    same = sum(MicroBatch(plain, 5, 61, torch.bfloat16, CPU).kept)
    assert kept == same + (2 * 5 * 61 * 42 if p else 0)


def linear_need(bytes_each):
    """A forecast of so many bytes for each sequence."""

    def need(*, micro_batch_size, block_size):
        return MemoryForecast(0, 0, 0, bytes_each * micro_batch_size, 0, 0)

    return need


@given(rows=st.integers(1, 60), most=st.integers(1, 80))
def test_the_fewest_micro_batches_that_fit_are_taken_and_are_equal(rows, most):
    size = fitting_micro_batch(linear_need(10), rows=rows, block_size=7, budget=10 * most)
    assert 1 <= size <= min(rows, most)
    n_parts = math.ceil(rows / size)
    assert n_parts == math.ceil(rows / min(rows, most)), "fewer parts would have fitted"
    assert math.ceil(rows / n_parts) == size, "smaller parts would have been more equal"


def test_the_caller_is_told_when_not_even_one_sequence_fits(caplog):
    need = linear_need(2_500_000_000)
    with caplog.at_level(logging.WARNING):
        assert fitting_micro_batch(need, rows=8, block_size=7, budget=2_500_000_000) == 1
        assert not caplog.records
        assert fitting_micro_batch(need, rows=8, block_size=7, budget=2_400_000_000) == 1
    assert "one sequence of 7 tokens needs about 2.5 GB, and 2.4 GB" in caplog.text


def test_a_forecast_in_words_says_what_is_needed_and_whether_it_is_there():
    need = forecast_of_124m()
    first, second = forecast_in_words(need, 20_000_000_000).splitlines()
    assert first.startswith(f"about {need.total / 1e9:.1f} GB of memory")
    assert ", of the 20.0 GB" in first
    assert "weights 0.5, gradients 0.5, optimizer 1.0, activations" in second
    assert ", more than the 1.0 GB" in forecast_in_words(need, 1_000_000_000)


def test_time_is_operations_over_speed():
    assert estimate_seconds(124_439_808, 1024, 1e11) == pytest.approx(7.6456, rel=1e-4)
    adapters = estimate_seconds(124_439_808, 1024, 1e11, n_trained=1_179_648)
    assert adapters == pytest.approx(5.1212, rel=1e-4)
    assert measured_speed(torch.device("cpu"), torch.float32) > 1e8
