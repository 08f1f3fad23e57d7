"""The forecast of a training step's memory, against what autograd and the allocator say."""

import json
import logging
import math
import mmap
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minigpt2 import memory
from minigpt2.blocks import prepare_blocks
from minigpt2.evaluate import Scorer
from minigpt2.lora import add_lora
from minigpt2.model import GPT2, PRESETS, Block, GPT2Config
from minigpt2.optim import make_optimizer
from minigpt2.precision import Precision
from minigpt2.training import train_step

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# pairwise different sizes, so that no two kinds of tensor are taken for one another
SMALL = GPT2Config(vocab_size=1511, block_size=67, n_embd=42, n_layer=3, n_head=3)
NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}


def kept_by_autograd(config, n_rows, dtype, masked):
    """Bytes that autograd keeps of one block, but its weights."""
    block = Block(config, 0)
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
    with hooks, Precision(CPU, dtype).autocast():
        block(x, mask, None)
    return sum(kept.values())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n_rows", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        NO_DROPOUT,
        NO_DROPOUT | {"attn_pdrop": 0.1},
        NO_DROPOUT | {"resid_pdrop": 0.1},
        NO_DROPOUT | {"n_inner": 97},
        NO_DROPOUT | {"activation_function": "relu"},
        NO_DROPOUT | {"activation_function": "gelu"},
        NO_DROPOUT | {"activation_function": "tanh"},
        NO_DROPOUT | {"activation_function": "silu"},
        NO_DROPOUT | {"reorder_and_upcast_attn": True},
        {"reorder_and_upcast_attn": True},
    ],
    ids=str,
)
def test_a_block_keeps_exactly_the_bytes_that_autograd_keeps(changes, dtype, n_rows, masked):
    config = replace(SMALL, **changes)
    batch = memory.MicroBatch(config, n_rows, 61, dtype, CPU, masked)
    assert sum(batch.kept) == kept_by_autograd(config, n_rows, dtype, masked)


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


@pytest.mark.parametrize("n_parts", [1, 3])
@pytest.mark.parametrize(
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
    ids=str,
)
def test_a_step_takes_the_tensors_that_were_forecast(
    tmp_path, changes, dtype, recomputed, rank, shape, n_parts
):
    config, (n_rows, row) = replace(SMALL, **changes), shape
    model = GPT2(config).train()
    if rank:
        add_lora(model, rank=rank, alpha=1.0)
    precision = Precision(CPU, dtype)
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
    need = memory.forecast(
        config,
        micro_batch_size=n_rows,
        block_size=row,
        dtype=dtype,
        device=CPU,
        activation_checkpointing=recomputed,
        n_trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        accumulated=n_parts > 1,
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
    assert memory.n_parameters(config) == sum(p.numel() for p in model.parameters())
    assert memory.block_parameters(config) == sum(p.numel() for p in model.h[0].parameters())


def forecast_of_124m(*, config=PRESETS["gpt2"], **changes):
    usual: dict[str, Any] = {
        "micro_batch_size": 4,
        "block_size": 1024,
        "dtype": torch.float32,
        "device": CPU,
    }
    return memory.forecast(config, **(usual | changes))


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
    kept = sum(memory.MicroBatch(config, 5, 61, torch.bfloat16, CUDA).kept)
    same = sum(memory.MicroBatch(plain, 5, 61, torch.bfloat16, CPU).kept)
    assert kept == same + (2 * 5 * 61 * 42 if p else 0)


def linear_need(bytes_each):
    """A forecast of so many bytes for each sequence."""

    def need(*, micro_batch_size, block_size):
        return memory.MemoryForecast(0, 0, 0, bytes_each * micro_batch_size, 0, 0)

    return need


@given(rows=st.integers(1, 60), most=st.integers(1, 80))
def test_the_fewest_micro_batches_that_fit_are_taken_and_are_equal(rows, most):
    size = memory.fitting_micro_batch(linear_need(10), rows=rows, block_size=7, budget=10 * most)
    assert 1 <= size <= min(rows, most)
    n_parts = math.ceil(rows / size)
    assert n_parts == math.ceil(rows / min(rows, most)), "fewer parts would have fitted"
    assert math.ceil(rows / n_parts) == size, "smaller parts would have been more equal"


def test_the_caller_is_told_when_not_even_one_sequence_fits(caplog):
    need = linear_need(2_500_000_000)
    with caplog.at_level(logging.WARNING):
        assert memory.fitting_micro_batch(need, rows=8, block_size=7, budget=2_500_000_000) == 1
        assert not caplog.records
        assert memory.fitting_micro_batch(need, rows=8, block_size=7, budget=2_400_000_000) == 1
    assert "one sequence of 7 tokens needs about 2.5 GB, and 2.4 GB" in caplog.text


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MACHINE = {"proc/meminfo": "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 5000 kB\n"}
V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"


def group_v1(folder, limit, used, forgettable=0):
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{used}\n",
        f"{folder}/memory.stat": f"inactive_file 7\ntotal_inactive_file {forgettable}\n",
    }


def group_v2(folder, limit, used, forgettable=0):
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon 7\ninactive_file {forgettable}\n",
    }


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({}, 5000 * 1024),
        ({"proc/self/cgroup": "0::/a/b\n"}, 5000 * 1024),
        # version 2: the group itself, the one above it, none, a container that sees only itself
        ({"proc/self/cgroup": "0::/a/b\n"} | group_v2(f"{V2}/a/b", 900, 500, 60), 460),
        ({"proc/self/cgroup": "0::/a/b\n"} | group_v2(f"{V2}/a", 900, 500), 400),
        ({"proc/self/cgroup": "0::/a/b\n"} | group_v2(f"{V2}/a/b", "max", 500), 5000 * 1024),
        ({"proc/self/cgroup": "0::/\n"} | group_v2(V2, 900, 500, 60), 460),
        ({"proc/self/cgroup": "0::/../b\n"} | group_v2(V2, 900, 500, 60), 460),
        (
            {"proc/self/cgroup": "0::/a/b\n"}
            | group_v2(f"{V2}/a/b", 900, 500)
            | group_v2(f"{V2}/a", 700, 650),
            50,
        ),
        # version 1
        (
            {"proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/c\n0::/\n"}
            | group_v1(f"{V1}/c", 900, 500, 60),
            460,
        ),
        ({"proc/self/cgroup": "4:memory:/docker/1f\n"} | group_v1(V1, 900, 500, 60), 460),
        ({"proc/self/cgroup": "4:memory:/c\n"} | group_v1(f"{V1}/c", 2**63 - 4096, 500), 5120000),
        ({"proc/self/cgroup": "4:memory:/c\n"} | group_v1(f"{V1}/c", 900, 950), 0),
    ],
)
def test_the_machine_and_every_limit_of_a_container_are_asked(tmp_path, groups, expected):
    assert memory._linux_available(write(tmp_path, MACHINE | groups)) == expected


def test_a_machine_that_does_not_say_what_it_has_is_not_guessed_at(tmp_path, monkeypatch):
    assert memory._linux_available(tmp_path) is None
    assert memory._linux_available(write(tmp_path, {"proc/meminfo": "MemTotal: 9 kB"})) is None
    monkeypatch.setattr(memory, "available", lambda device: None)
    assert memory.budget(CPU) == memory.ASSUMED
    assert memory.budget(CPU, n_processes=2) == memory.ASSUMED // 2


def test_the_budget_is_a_share_of_what_is_free_and_what_is_held(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    monkeypatch.setattr(memory, "_held", lambda device: 200)
    assert memory.budget(CPU) == 960
    assert memory.budget(CPU, n_processes=4) == 360
    assert memory.budget(CUDA) == 1080


@pytest.mark.skipif(sys.platform != "linux", reason="reads what is held from /proc")
def test_the_peak_rises_with_what_is_taken_and_stays():
    held = memory._held(CPU)
    before = memory.peak(CPU)
    assert 0 < held <= before + 2**22  # the kernel counts some pages later
    size = max(0, before - held) + 2**27
    with mmap.mmap(-1, size) as taken:  # not a tensor: the heap may have room for it already
        taken.write(b"x" * size)
        assert memory._held(CPU) >= held + 2**26
        after = memory.peak(CPU)
        assert after >= before + 2**26
    assert memory.peak(CPU) >= after


def test_a_table_says_what_is_needed_and_whether_it_is_there(monkeypatch):
    need = forecast_of_124m()
    monkeypatch.setattr(memory, "budget", lambda device, n_processes: 20_000_000_000 // n_processes)
    first, second = memory.table(need, CPU).splitlines()
    assert first.startswith(f"about {need.total / 1e9:.1f} GB of memory")
    assert ", of the 20.0 GB" in first
    assert ", more than the 10.0 GB" in memory.table(need, CPU, n_processes=2)
    assert "weights 0.5, gradients 0.5, optimizer 1.0, activations" in second
    monkeypatch.setattr(memory, "budget", lambda device, n_processes: 1_000_000_000)
    assert ", more than the 1.0 GB" in memory.table(need, CPU)
