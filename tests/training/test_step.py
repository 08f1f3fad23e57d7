"""One optimizer step: its arithmetic, however the batch is cut, and what it does when it fails."""

import math

import pytest
import torch
import torch.nn as nn

from minigpt2.evaluation.scorer import Scorer
from minigpt2.system.precision import Precision
from minigpt2.system.processes import World
from minigpt2.training.optimizer import make_optimizer
from minigpt2.training.step import NotFiniteError, accumulate, train_step
from tiny_training import CPU, FLOAT32, parameters, tiny_model


def ragged_batch(n_rows=7, seed=11):
    """idx, targets whose rows have very different numbers of scored tokens."""
    generator = torch.Generator().manual_seed(seed)
    idx = torch.randint(300, (n_rows, 13), generator=generator)
    targets = torch.randint(300, (n_rows, 13), generator=generator)
    for row in range(n_rows):
        targets[row, 1 + row * 2 :] = -100
    return idx, targets


def step_of(model, *, micro_batch_size=7, precision=FLOAT32, optimizer=None, grad_clip=0.0, lr=0.0):
    optimizer = optimizer or make_optimizer(model, learning_rate=0.0, weight_decay=0.0)
    return train_step(
        Scorer(model),
        ragged_batch(),
        optimizer,
        precision,
        micro_batch_size=micro_batch_size,
        learning_rate=lr,
        grad_clip=grad_clip,
        seed=3,
    )


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 5, 100])
def test_gradient_and_loss_do_not_depend_on_how_the_batch_is_cut(micro_batch_size):
    whole, cut = tiny_model(dropout=0.0), tiny_model(dropout=0.0)
    expected = accumulate(Scorer(whole), ragged_batch(), FLOAT32, 7, seed=3)
    got = accumulate(Scorer(cut), ragged_batch(), FLOAT32, micro_batch_size, seed=3)
    assert got == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(gradients(cut), gradients(whole), atol=1e-6, rtol=0)


@pytest.mark.parametrize("micro_batch_size", [2, 7])
def test_a_batch_of_prompts_alone_has_no_loss_and_no_gradient(micro_batch_size):
    model, (idx, targets) = tiny_model(), ragged_batch()
    nothing = idx, torch.full_like(targets, -100)
    assert accumulate(Scorer(model), nothing, FLOAT32, micro_batch_size, seed=3) == 0
    assert not gradients(model).any()


def test_the_logged_loss_is_the_mean_over_all_scored_tokens():
    model = tiny_model(dropout=0.0)
    idx, targets = ragged_batch()
    expected = nn.functional.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    stats = step_of(model, micro_batch_size=2)
    assert stats.loss == pytest.approx(expected.item(), rel=1e-6)
    assert stats.n_tokens == sum(min(13, 1 + row * 2) for row in range(7))


class Pretended(World):
    """One of several processes whose turn comes one after the other."""

    def gather(self, value):
        return [value]


# dropout is the same where every process's rows make whole micro-batches; 7 rows leave a remainder
@pytest.mark.parametrize(
    ("n_rows", "size", "micro_batch_size", "dropout"),
    [
        (6, 2, 3, 0.1),
        (6, 2, 1, 0.1),
        (6, 3, 2, 0.1),
        (7, 7, 1, 0.1),
        (7, 2, 2, 0.0),
        (7, 5, 2, 0.0),
    ],
)
def test_processes_together_compute_what_one_does(n_rows, size, micro_batch_size, dropout):
    alone, shared, batch = (
        tiny_model(dropout=dropout),
        tiny_model(dropout=dropout),
        ragged_batch(n_rows),
    )
    expected = accumulate(Scorer(alone), batch, FLOAT32, micro_batch_size, seed=3)
    # gradients of the processes add up in the one model; DDP would take their mean
    losses = [
        accumulate(Scorer(shared), batch, FLOAT32, micro_batch_size, 3, Pretended(rank, size))
        for rank in range(size)
    ]
    assert sum(losses) == pytest.approx(expected, abs=2e-6)
    torch.testing.assert_close(gradients(shared) / size, gradients(alone), atol=1e-6, rtol=0)


class OutOfMemory:
    """A scorer that finds no memory for more than `most` rows."""

    def __init__(self, model, most, error):
        self.scorer, self.most, self.error = Scorer(model), most, error
        self.parameters = self.scorer.parameters

    def __call__(self, idx, targets, scale):
        if len(idx) > self.most:
            raise self.error
        return self.scorer(idx, targets, scale)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_out_of_memory_halves_the_micro_batch_and_repeats_the_same_step(error, caplog):
    def trained(scorer_of, micro_batch_size):
        model = tiny_model()
        optimizer = make_optimizer(model, learning_rate=0.1, weight_decay=0.1)
        stats = train_step(
            scorer_of(model),
            ragged_batch(),
            optimizer,
            FLOAT32,
            micro_batch_size=micro_batch_size,
            learning_rate=0.1,
            grad_clip=1.0,
            seed=3,
        )
        return stats, parameters(model)

    stats, weights = trained(lambda model: OutOfMemory(model, 2, error), 7)
    expected, expected_weights = trained(Scorer, 2)
    assert stats == expected  # 7 -> 4 -> 2
    assert torch.equal(weights, expected_weights)
    assert "again, with 4 sequences at a time" in caplog.text
    with pytest.raises(type(error)):
        trained(lambda model: OutOfMemory(model, 0, error), 7)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    scorer = OutOfMemory(tiny_model(), 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        accumulate(scorer, ragged_batch(), FLOAT32, 7, seed=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_clipping_sees_true_gradients_whatever_the_loss_scale(dtype):
    # with SGD at rate 1 and a gradient above the clip, the parameters move by exactly the clip
    model = tiny_model(dropout=0.0)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    stats = step_of(
        model,
        micro_batch_size=3,
        precision=Precision(CPU, dtype),
        optimizer=optimizer,
        grad_clip=0.01,
        lr=1.0,
    )
    moved = (nn.utils.parameters_to_vector(model.parameters()) - before).norm().item()
    assert stats.grad_norm > 0.01
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_weights_and_optimizer_state_stay_float32_under_autocast():
    model = tiny_model()
    optimizer = make_optimizer(model, learning_rate=0.1, weight_decay=0.0)
    step_of(model, precision=Precision(CPU, torch.bfloat16), optimizer=optimizer, lr=0.1)
    state = [t for s in optimizer.state.values() for t in s.values()]
    assert {t.dtype for t in [*model.parameters(), *state]} == {torch.float32}


def test_float16_overflow_skips_the_step_halves_the_scale_and_says_so():
    model = tiny_model(dropout=0.0)
    precision = Precision(CPU, torch.float16)
    optimizer = make_optimizer(model, learning_rate=0.1, weight_decay=0.0)
    handle = model.ln_f.weight.register_hook(lambda grad: grad * float("inf"))
    before = [p.detach().clone() for p in model.parameters()]
    scale = precision.scaler.get_scale()
    stats = step_of(model, precision=precision, optimizer=optimizer, lr=0.1)
    assert stats.skipped
    assert precision.scaler.get_scale() == scale / 2
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    handle.remove()
    assert not step_of(model, precision=precision, optimizer=optimizer, lr=0.1).skipped


def test_a_gradient_that_is_not_a_number_stops_before_the_weights_change():
    model = tiny_model()
    model.ln_f.weight.register_hook(lambda grad: grad * float("nan"))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(NotFiniteError, match="gradient norm nan"):
        step_of(model, optimizer=make_optimizer(model, learning_rate=0.1, weight_decay=0.1), lr=0.1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_one_batch_can_be_learned_by_heart():
    model = tiny_model(dropout=0.0)
    optimizer = make_optimizer(model, learning_rate=0.02, weight_decay=0.0)
    losses = [step_of(model, optimizer=optimizer, grad_clip=1.0, lr=0.02).loss for _ in range(150)]
    assert losses[0] == pytest.approx(math.log(300), abs=0.3)
    assert losses[-1] < 0.1
