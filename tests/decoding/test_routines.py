"""What is chosen is the fastest by a clear margin, measured once, and kept."""

import functools
import json
import multiprocessing
import os
import shutil
import stat

import pytest
import torch
import torch.nn as nn

from hf_models import randomise, token_ids
from minigpt2.decoding import routines
from minigpt2.decoding.cpu_layout import ROUTINES, pack
from minigpt2.decoding.int8 import quantize
from minigpt2.decoding.ready import load
from minigpt2.decoding.routines import ROWS, Routine, choose, fastest, measured
from minigpt2.equivalences import WAYS, ways_of
from minigpt2.evaluation.agreement import shortfall
from minigpt2.generate import generate
from minigpt2.model import GPT2, GPT2Config
from minigpt2.sampling import SamplingConfig

NAMES = [routine.name for routine in ROUTINES]
MIXED = ("plain", "packed")
SHAPES = [(60, 20), (20, 20), (90, 30)]
LOGGER = "minigpt2.decoding.routines"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "cache"))
    # no shape is too small, and a few matrices are enough
    monkeypatch.setattr(routines, "LEAST_BYTES", 0)
    monkeypatch.setattr(routines, "RING_BYTES", 2**16)
    monkeypatch.setattr(routines, "MOST_BYTES", 2**14)


class Clock:
    """A clock that only products move, by what is said for a routine, shape and number of rows."""

    def __init__(self, seconds):
        self.seconds, self.now, self.products = seconds, 0.0, 0

    def __call__(self):
        return self.now

    def candidates(self, *names):
        """Routines of these names."""
        return [Routine(name, "plain float32", self._make(name)) for name in names]

    def _make(self, name):
        clock = self

        class Product(nn.Module):
            def __init__(self, linear):
                super().__init__()
                self.shape = tuple(linear.weight.shape)

            def forward(self, x):
                clock.products += 1
                clock.now += clock.seconds(name, self.shape, x.shape[0])

        return Product


def constant(**seconds):
    return Clock(lambda name, shape, n_rows: seconds[name])


def chosen(clock, *names, shapes=SHAPES):
    """The name of the routine for every shape, or of both where there is one for more rows."""
    found = choose(clock.candidates(*names), shapes, clock=clock)
    pairs = {shape: (one.name, some.name) for shape, (one, some) in found.items()}
    return {shape: one if one == some else (one, some) for shape, (one, some) in pairs.items()}


def kept_files(tmp_path):
    return list((tmp_path / "cache" / "routines").glob("*.json"))


def test_the_fastest_is_chosen():
    clock = constant(plain=0.010, packed=0.008, slices=0.007)
    assert chosen(clock, "plain", "packed", "slices") == dict.fromkeys(SHAPES, "slices")


def test_each_shape_has_its_own():
    def seconds(name, shape, n_rows):
        return 0.005 if (name == "packed") == (shape == (20, 20)) else 0.010

    assert chosen(Clock(seconds), "plain", "packed") == {
        (60, 20): "plain", (20, 20): "packed", (90, 30): "plain"
    }  # fmt: skip


@pytest.mark.parametrize(("share", "winner"), [(0.96, "plain"), (0.94, "packed"), (1.5, "plain")])
def test_what_is_not_clearly_ahead_is_noise(share, winner):
    clock = constant(plain=0.010, packed=0.010 * share)
    assert set(chosen(clock, "plain", "packed").values()) == {winner}


def test_one_row_and_more_have_the_fastest_of_their_own(caplog):
    assert ROWS == (1, 8)
    seconds = {"plain": (1.0, 4.0), "packed": (1.6, 2.0), "slices": (0.7, 6.0)}
    assert fastest(seconds) == ("slices", "packed")
    assert fastest({"plain": (1.0, 4.0), "packed": (1.06, 2.0)}) == ("plain", "packed")
    caplog.set_level("DEBUG", LOGGER)
    clock = Clock(lambda name, shape, n_rows: (0.01, 0.02)[(name == "packed") == (n_rows == 1)])
    assert set(chosen(clock, "plain", "packed").values()) == {("plain", "packed")}
    assert "on the CPU: plain for one row, packed for more (ms" in caplog.messages[0]


def test_a_second_layout_is_not_made_for_noise():
    seconds = {"plain": (1.0, 4.0), "packed": (1.05, 2.0)}
    assert fastest(seconds) == ("packed", "packed")
    seconds = {"plain": (1.0, 4.0), "packed": (0.96, 3.81)}
    assert fastest(seconds) == ("plain", "plain")


def test_a_busy_moment_does_not_count():
    busy = iter([1.0] * 5)  # whatever comes first

    def seconds(name, shape, n_rows):
        return next(busy, 0.009 if name == "packed" else 0.010)

    clock = Clock(seconds)
    assert set(chosen(clock, "plain", "packed").values()) == {"packed"}


def test_a_slow_machine_is_not_measured_for_long():
    quick, slow = constant(plain=1e-6, packed=1e-6), constant(plain=1.0, packed=1.0)
    for clock in (quick, slow):
        measured(clock.candidates("plain", "packed"), SHAPES, clock=clock)
    assert slow.products * routines.ROUNDS == quick.products * routines.LEAST_ROUNDS


def test_what_is_measured_is_larger_than_caches_and_of_a_head_a_part(monkeypatch):
    monkeypatch.undo()
    made = []
    monkeypatch.setattr(
        torch, "full", lambda shape, value: made.append(shape) or torch.empty(shape)
    )
    for _ in routines._ring([(2304, 768), (768, 768), (50257, 768)]):
        pass
    n_bytes = [4 * n * k for n, k in made]
    assert 70e6 < sum(n_bytes) <= routines.RING_BYTES and max(n_bytes) <= routines.MOST_BYTES


def test_it_is_measured_once_and_kept(tmp_path, caplog):
    caplog.set_level("DEBUG", LOGGER)
    clock = constant(plain=0.010, packed=0.008)
    first = chosen(clock, "plain", "packed")
    n_products, said = clock.products, caplog.messages[:]
    assert n_products and len(said) == len(SHAPES)
    assert said[0] == (
        "products with 60 x 20 on the CPU: packed (ms for 1 and 8 rows: plain 10.00 and 10.00, "
        "packed 8.00 and 8.00)"
    )
    other = constant(plain=0.001, packed=1.0)  # it would be chosen otherwise now
    caplog.clear()
    assert chosen(other, "plain", "packed") == first and other.products == 0
    assert caplog.messages == said
    assert len(kept_files(tmp_path)) == 1


def test_a_new_shape_is_measured_and_the_others_stay(tmp_path):
    first = chosen(constant(plain=0.010, packed=0.008), "plain", "packed", shapes=SHAPES[:1])
    clock = constant(plain=0.001, packed=1.0)
    both = chosen(clock, "plain", "packed")
    assert both == {**dict.fromkeys(SHAPES, "plain"), **first}
    assert both[SHAPES[0]] == "packed" and len(kept_files(tmp_path)) == 1
    n_products = clock.products
    assert chosen(clock, "plain", "packed") == both and clock.products == n_products


@pytest.mark.parametrize("what", ["processor", "threads", "torch", "routines"])
def test_another_machine_is_measured_by_itself(what, tmp_path, monkeypatch):
    chosen(constant(plain=0.010, packed=0.008), "plain", "packed")
    names = ["plain", "packed"]
    if what == "processor":
        monkeypatch.setattr(routines, "processor_name", lambda: "another")
    elif what == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    elif what == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
    else:
        names.append("slices")
    clock = constant(plain=0.001, packed=1.0, slices=1.0)
    assert set(chosen(clock, *names).values()) == {"plain"}
    assert len(kept_files(tmp_path)) == 2


def times(shape, **seconds):
    return {"seconds": {shape: seconds}}


CHANGES = {
    "of another machine": {"processor": "another"},
    "no times": times("60 x 20", plain=[0.0, 1.0], packed=[1.0, 1.0]),
    "too few": times("60 x 20", plain=[1.0], packed=[1.0]),
    "another routine": times("60 x 20", plain=[1.0, 1.0], best=[0.1, 0.1]),
    "no shape": times("60 by 20", plain=[1.0, 1.0], packed=[1.0, 1.0]),
    "a number": {"seconds": {"60 x 20": 3}},
    "nothing": {"seconds": None},
}
BYTES = {"empty": b"", "cut off": b'{"processor": ', "no text": b"\xff\x00", "a list": b"[3]"}


@pytest.mark.parametrize("damage", [*CHANGES, *BYTES])
def test_a_damaged_file_is_told_of_and_made_anew(damage, tmp_path, caplog):
    chosen(constant(plain=0.010, packed=0.008), "plain", "packed")
    (path,) = kept_files(tmp_path)
    whole = json.loads(path.read_text())
    changed = json.dumps({**whole, **CHANGES.get(damage, {})}).encode()
    path.write_bytes(BYTES.get(damage, changed))
    clock = constant(plain=0.010, packed=0.008)
    assert set(chosen(clock, "plain", "packed").values()) == {"packed"} and clock.products
    (line,) = caplog.messages
    assert path.name in line and line.endswith(": measuring the CPU's routines anew")
    assert set(json.loads(path.read_text())) == set(whole)
    caplog.clear()
    assert set(chosen(constant(plain=1, packed=9), "plain", "packed").values()) == {"packed"}
    assert not caplog.messages


@pytest.mark.parametrize("trouble", ["a file", "closed"])
def test_a_cache_that_cannot_be_written_costs_the_measurement_only(
    trouble, tmp_path, caplog, monkeypatch
):
    place = tmp_path / "cache"
    if trouble == "a file":
        place.write_text("in the way")
    else:
        monkeypatch.setattr(
            routines, "write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left"))
        )
    clock = constant(plain=0.010, packed=0.008)
    assert set(chosen(clock, "plain", "packed").values()) == {"packed"}
    once = clock.products
    (line,) = caplog.messages
    assert "the choice of the CPU's routines is not kept" in line and "MINIGPT2_CACHE" in line
    chosen(clock, "plain", "packed")
    assert clock.products == 2 * once


def test_the_cache_is_the_users_own(tmp_path):
    chosen(constant(plain=0.010, packed=0.008), "plain", "packed")
    assert stat.S_IMODE((tmp_path / "cache" / "routines").stat().st_mode) == 0o700


def choose_and_say(cache, seconds, start, said):
    os.environ["MINIGPT2_CACHE"] = cache
    routines.LEAST_BYTES, routines.RING_BYTES = 0, 2**16
    clock = constant(**seconds)
    start.wait()
    said.put((chosen(clock, "plain", "packed"), clock.products))


def test_two_processes_at_once_choose_alike_and_one_of_them_measures(tmp_path):
    context = multiprocessing.get_context("fork")
    start, said = context.Barrier(2), context.Queue()
    clocks = ({"plain": 0.010, "packed": 0.008}, {"plain": 0.008, "packed": 0.010})
    started = [
        context.Process(target=choose_and_say, args=(str(tmp_path / "cache"), clock, start, said))
        for clock in clocks
    ]
    for process in started:
        process.start()
    (one, by_one), (other, by_other) = said.get(timeout=60), said.get(timeout=60)
    for process in started:
        process.join()
    assert one == other
    assert (by_one == 0) != (by_other == 0)
    assert len(kept_files(tmp_path)) == 1


def test_small_matrices_and_a_lone_candidate_are_not_measured(tmp_path, monkeypatch):
    clock = constant(plain=1.0, packed=0.1)
    assert set(chosen(clock, "plain").values()) == {"plain"}
    monkeypatch.setattr(routines, "LEAST_BYTES", 4 * 2**20)
    assert set(chosen(clock, "plain", "packed", shapes=[(1024, 1023)]).values()) == {"plain"}
    assert clock.products == 0 and not kept_files(tmp_path)
    assert set(chosen(clock, "plain", "packed", shapes=[(1024, 1024)]).values()) == {"packed"}


# real routines


def random_model(**values):
    shape = {"vocab_size": 257, "block_size": 256, "n_embd": 48, "n_layer": 2, "n_head": 2}
    model = GPT2(GPT2Config(**{**shape, **values})).eval()
    randomise(model, std=0.2)
    return model


def test_a_model_goes_the_ways_that_were_chosen(monkeypatch):
    names = iter([("slices", "slices"), ("packed", "packed"), ("plain", "plain")])

    def choose(candidates, shapes):
        by_name = {routine.name: routine for routine in candidates}
        different = dict.fromkeys(shapes)
        return {shape: tuple(map(by_name.get, next(names, MIXED))) for shape in different}

    monkeypatch.setattr("minigpt2.decoding.cpu_layout.choose", choose)
    model = random_model().requires_grad_(False)
    idx = token_ids(257, 3, 9)
    expected = model(idx)
    pack(model)
    ways = {path: way for path, (way,) in ways_of(model).items() if path != "read"}
    names = {"plain float32", "packed float32", "sliced float32", "float32 by rows"}
    assert set(ways.values()) == names
    assert ways["h.0.mlp.c_fc"] == ways["h.1.mlp.c_fc"] == "plain float32"
    assert ways["lm_head"] == "float32 by rows"
    assert WAYS["packed float32"].agrees(model(idx), expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("routines") / "model"
    random_model().save_pretrained(place)
    return place


LOADED = {  # what is compared, and with what
    **{name: ({"cpu_routine": name}, "plain") for name in [*NAMES, "by-rows"]},
    "C": ({"compiled": True}, "plain"),
    "int8": ({"dtype": "int8"}, "int8"),
    "int8 in C": ({"dtype": "int8", "compiled": True}, "int8"),
}
PROMPTS = [token_ids(257, 20, 12)[row, : row % 12 + 1].tolist() for row in range(20)]


@pytest.fixture(scope="module")
def written(folder):
    """200 tokens after each of the prompts, ten prompts at once and one alone, by name."""

    @functools.cache
    def texts(name):
        model, greedy = load(folder, device="cpu", **LOADED[name][0]), SamplingConfig(temperature=0)
        parts = [PROMPTS[:10], PROMPTS[10:19], PROMPTS[19:]]
        made = (generate(model, part, max_new_tokens=200, sampling=greedy) for part in parts)
        return [text for part in made for text in part]

    return texts


@pytest.mark.parametrize("name", [name for name, (_, twin) in LOADED.items() if name != twin])
def test_routines_write_the_same_greedy_texts(folder, written, name):
    if name.endswith("C") and shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    twin, expected = GPT2.from_pretrained(folder), written(LOADED[name][1])
    way = WAYS["int8 in C" if name == "int8 in C" else "packed float32"]
    if way.twin == "int8":
        quantize(twin.requires_grad_(False))
    assert len({id for text in expected for id in text}) > 20, "the texts say nothing"
    n_equal = 0
    for prompt, text, plain in zip(PROMPTS, written(name), expected):
        assert len(text) == len(plain) == 200
        n_equal += text == plain
        if text != plain:  # two tokens so nearly alike that rounding decides
            assert shortfall(twin, prompt, text) <= 2 * way.tolerance
    assert n_equal >= 18
