"""Every JSON that is read back, each value of it replaced by each other kind: it is accepted, or it
is said to be damaged.
"""

import contextlib
import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt2.corpus import prepared as corpus
from minigpt2.errors import InputError
from minigpt2.formats.tensors import read_tensors, write_tensors
from minigpt2.hub.snapshot import read_record, shard_names
from minigpt2.lora import add_lora, load_adapter, save_adapter
from minigpt2.model import GPT2
from minigpt2.runs.folder import MANIFEST, STATE, RunFolder, _seal
from minigpt2.runs.record import Metrics, ModelInfo, RunInfo, Session, Settings
from minigpt2.runs.state import Facts, TrainState
from minigpt2.tokenizer import Tokenizer
from minigpt2.training.optimizer import make_optimizer, optimizer_tensors
from scripts import run_here, tiny_folder
from vocabularies import quick

VALUES = [None, True, "x", "", -1, 0, 1.5, 2**20, 10**30, 10**400, [], ["x"], {}, {"x": None}, [[]]]
MOST_PLACES = 25  # of one file: a vocabulary has hundreds of equal ones


def spoiled(value: object) -> Iterator[object]:
    """A JSON value with one part replaced, or left out, after the other."""
    places = [*_places(value)]
    if len(places) > MOST_PLACES:
        places = [places[0], *random.Random(5).sample(places[1:], MOST_PLACES)]
    for place in places:
        yield from (_with(value, place, other) for other in VALUES)
        if place:
            yield _with(value, place, None, leave_out=True)


def _places(value: object, place: tuple = ()) -> Iterator[tuple]:
    yield place
    parts = value.items() if isinstance(value, dict) else ()
    parts = enumerate(value) if isinstance(value, list) else parts
    for key, part in parts:
        yield from _places(part, (*place, key))


def _with(value: object, place: tuple, other: object, *, leave_out: bool = False) -> object:
    if not place:
        return copy.deepcopy(other)
    whole = copy.deepcopy(value)
    inner = whole
    for key in place[:-1]:
        inner = inner[key]  # type: ignore[index]
    if leave_out:
        del inner[place[-1]]  # type: ignore[attr-defined]
    else:
        inner[place[-1]] = copy.deepcopy(other)  # type: ignore[index]
    return whole


def each_spoiled(path: Path) -> Iterator[str]:
    """Put a spoiled JSON after the other into a file; the file itself afterwards."""
    text = path.read_text()
    for value in spoiled(json.loads(text)):
        path.write_text(spelled := json.dumps(value))
        yield spelled
    path.write_text(text)


@pytest.fixture
def run(tmp_path):
    """A run folder with two checkpoints."""
    run = RunFolder(tmp_path / "run")
    model = GPT2.from_pretrained(tiny_folder(tmp_path / "model"))
    optimizer = make_optimizer(model, learning_rate=0.1, weight_decay=0.1)
    for step in (3, 5):
        run.save_checkpoint(
            TrainState(step=step, best_val_loss=2.5, unjudged=Metrics(step, 2.0, 0.1)),
            write_weights=model.save_pretrained,
            optimizer=optimizer_tensors(model, optimizer),
            scaler={},
            facts=Facts(data="abc"),
            settings=Settings(max_steps=20, dropout=0.1),
        )
    run.write_info(RunInfo((Session(command="x"),), ModelInfo(source="gpt2")))
    return run


@pytest.mark.parametrize(("name", "sealed"), [(MANIFEST, False), (STATE, False), (STATE, True)])
def test_a_spoiled_checkpoint_is_damaged_and_the_one_before_counts(run, name, sealed, caplog):
    newest, before = run.checkpoints()
    gone_back = 0
    for spelled in each_spoiled(newest / name):
        if sealed:
            (newest / MANIFEST).unlink()
            _seal(newest)
        try:
            found = RunFolder(run.path).newest()
        except InputError as problem:
            assert "another version" in str(problem), spelled
            continue
        assert found.path in (newest, before), spelled
        gone_back += found.path == before
        found.require(found.facts)
        assert found.state.step >= 0 and not found.state.ended(10**18 + found.state.step)
    assert gone_back > 10
    assert f"{newest} is damaged" in caplog.text


def test_a_spoiled_run_record_is_none(run):
    for spelled in each_spoiled(run.info_path):
        info = RunFolder(run.path).read_info()
        assert info is None or info.to_json() == RunInfo.from_json(info.to_json()).to_json(), (
            spelled
        )


@pytest.mark.parametrize("kind", ["metrics", "samples"])
def test_spoiled_lines_are_left_out(run, kind):
    line = {"step": 7, "loss": 2.5, "val_loss": 2.25}
    line = line if kind == "metrics" else {"step": 7, "prompt": "a", "text": "b"}
    path = run.metrics_path if kind == "metrics" else run.samples_path
    path.write_text("".join(json.dumps(other) + "\n" for other in spoiled(line)))
    run.forget_after(6)
    lines = run.read_metrics() if kind == "metrics" else run.read_samples()
    assert {line.step for line in lines} <= {0}
    assert all(text.startswith("{") for text in path.read_text().splitlines())


MODEL_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "vocab.json",
    "tokenizer.json",
    "added_tokens.json",
]


@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_spoiled_model_folder_is_refused_or_read(tmp_path, name):
    folder = tiny_folder(tmp_path / "model")
    (folder / "tokenizer.json").unlink()  # before which the others do not count
    if name == "tokenizer.json":
        transformers = pytest.importorskip("transformers")
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "fast")
        shutil.copy(tmp_path / "fast" / name, folder)
        (folder / "vocab.json").unlink()
    if name == "added_tokens.json":
        (folder / name).write_text(json.dumps({"<x>": 299}))
    accepted = 0
    for spelled in each_spoiled(folder / name):
        try:
            if name in ("config.json", "generation_config.json"):
                with torch.no_grad():
                    GPT2.from_pretrained(folder)
            Tokenizer.from_pretrained(folder).encode("the lamp")
            accepted += 1
        except InputError:
            pass
        except Exception as problem:
            raise AssertionError(f"{name} as {spelled[:300]}") from problem
    assert accepted > 0


# beyond 32 and 64 bits and what floats count exactly, half characters, what a terminal obeys
EDGES = [-1, 2**31 - 2, 2**31 - 1, 2**32, 2**53 + 1, 2**63, 2**64, 10**30, 1e308, 1e-300, -0.0]
CHARACTERS = st.sampled_from(
    ["\ud800", "a\udfffb", "\x1b[2J", "\0", "\n", "\x85", "\u202e", "x" * 999]
)
TEXTS = CHARACTERS | st.text(st.characters(exclude_categories=[]), max_size=4)
HOSTILE = st.recursive(
    st.sampled_from([None, True, *EDGES]) | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=3,
)


@st.composite
def hostile(draw: st.DrawFn, value: Any) -> str:
    """A JSON value with a hostile one in a place, a hostile name of a field, or a number that is
    equal and of another type; as it is written, so that surrogates and NULs are escapes.
    """
    places = [place for place in _places(value) if place]
    # a vocabulary has hundreds of equal ones
    few = [p for p in places if p[:2] not in (("model", "vocab"), ("model", "merges"))]
    place = draw(st.sampled_from(few if draw(st.booleans()) and few else places))
    whole = copy.deepcopy(value)
    inner = whole
    for key in place[:-1]:
        inner = inner[key]
    how = draw(st.sampled_from(["value", "value", "name", "type"]))
    if how == "name" and isinstance(inner, dict):
        inner[draw(TEXTS)] = inner.pop(place[-1])
    elif how == "type" and isinstance(inner[place[-1]], (int, float)):
        inner[place[-1]] = draw(st.sampled_from([float, str, bool]))(inner[place[-1]])
    else:
        inner[place[-1]] = draw(HOSTILE)
    return json.dumps(whole)


def full_folder(folder: Path, *, fast: bool = False) -> Path:
    """A model folder with every file that a tokenizer of any age has."""
    tiny_folder(folder)
    (folder / "tokenizer.json").unlink()  # before which the others do not count
    config = json.loads((folder / "tokenizer_config.json").read_text())
    more = {"chat_template": "{{ messages }}", "pad_token": "<x>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **more}))
    (folder / "added_tokens.json").write_text(json.dumps({"<x>": 300}))
    names = {"eos_token": "<|endoftext|>", "pad_token": {"content": "<x>", "lstrip": False}}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    if fast:
        transformers = pytest.importorskip("transformers")
        saved = transformers.AutoTokenizer.from_pretrained(folder)
        saved.backend_tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "vocab.json").unlink()
    return folder


@pytest.mark.parametrize("name", [*MODEL_FILES, "special_tokens_map.json"])
def test_a_hostile_value_is_a_line_that_names_the_file_or_reads_back(tmp_path, capsys, name):
    folder = full_folder(tmp_path / "folder", fast=name == "tokenizer.json")
    text, dest, again = (folder / name).read_text(), tmp_path / "dest", tmp_path / "again"

    @settings(max_examples=25, deadline=None)  # each is two conversions
    @given(hostile(json.loads(text)))
    def law(spelled):
        (folder / name).write_text(spelled)
        for made in (dest, again):
            shutil.rmtree(made, ignore_errors=True)
        done = run_here(capsys, "convert_weights", folder, dest)
        assert all(c.isprintable() or c == "\n" for c in done.err)
        if done.code == 2:
            assert done.last_line.startswith("error: ") and str(folder) in done.last_line
            assert not dest.exists()
            return
        assert done.code == 0
        assert run_here(capsys, "convert_weights", dest, again).code == 0
        assert {p.name: p.read_bytes() for p in dest.iterdir()} == {
            p.name: p.read_bytes() for p in again.iterdir()
        }

    law()


def test_a_spoiled_adapter_is_refused_or_read(tmp_path):
    base = tiny_folder(tmp_path / "model")
    model = GPT2.from_pretrained(base)
    add_lora(model, rank=3, alpha=6, generator=torch.Generator())
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter", base_model=str(base), identity=None)
    for spelled in each_spoiled(tmp_path / "adapter" / "adapter_config.json"):
        try:
            load_adapter(GPT2.from_pretrained(base), tmp_path / "adapter")
            GPT2.from_pretrained(tmp_path / "adapter")
        except InputError:
            pass
        except Exception as problem:
            raise AssertionError(spelled[:300]) from problem


def test_hostile_values_of_an_adapter_are_a_line_that_names_the_file(tmp_path):
    base = tiny_folder(tmp_path / "model")
    model = GPT2.from_pretrained(base)
    add_lora(model, rank=3, alpha=6, generator=torch.Generator())
    save_adapter(model, folder := tmp_path / "adapter", base_model=str(base), identity=None)
    path = folder / "adapter_config.json"

    @quick
    @given(hostile(json.loads(path.read_text())))
    def law(spelled):
        path.write_text(spelled)
        try:
            GPT2.from_pretrained(folder)
        except InputError as problem:
            assert str(problem).isprintable() and str(folder) in str(problem)

    law()


def test_hostile_values_in_a_header_of_weights_are_a_line_that_names_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": torch.ones(3), "b": torch.ones(2, 2)}, {"note": "x"})
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")

    @quick
    @given(hostile(json.loads(data[8 : 8 + length])))
    def law(spelled):
        text = spelled.encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        try:
            tensors, _ = read_tensors(path)
            assert sum(tensor.numel() for tensor in tensors.values()) == 7
        except InputError as problem:
            assert str(problem).isprintable() and str(path) in str(problem)

    law()


def test_hostile_values_in_a_run_record_are_a_line_or_read(run, capsys):
    text = run.info_path.read_text()

    @quick
    @given(hostile(json.loads(text)))
    def law(spelled):
        run.info_path.write_text(spelled)
        info = RunFolder(run.path).read_info()
        assert info is None or info.to_json() == RunInfo.from_json(info.to_json()).to_json()
        assert info is None or json.dumps(info.to_json(), ensure_ascii=False).encode()
        done = run_here(capsys, "train", "--resume", "--out", run.path)
        assert done.code == 2 and all(c.isprintable() or c == "\n" for c in done.err)

    law()


def test_a_spoiled_index_of_shards_is_refused_or_read(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 8}, "weight_map": {"a": "a.bin"}}))
    for spelled in each_spoiled(index):
        with contextlib.suppress(InputError):
            assert shard_names(index) in (["a.bin"], ["x"]), spelled


def test_a_spoiled_header_of_weights_is_refused_or_read(tmp_path):
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": torch.ones(3), "b": torch.ones(2, 2)})
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for other in spoiled(header):
        text = json.dumps(other).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        try:
            read_tensors(path)
        except InputError:
            pass
        except Exception as problem:
            raise AssertionError(text[:300]) from problem


@pytest.mark.parametrize(("kind", "values"), [(int, [3, 5]), (str, ["a", "b"])])
def test_a_spoiled_record_of_a_download_counts_as_far_as_it_is_one(tmp_path, kind, values):
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"one": values, "two": values}))
    assert read_record(path, kind) == {"one": values, "two": values}
    for spelled in each_spoiled(path):
        for found in read_record(path, kind).values():
            assert all(type(value) is kind for value in found), spelled


def test_a_spoiled_token_cache_is_made_anew(tmp_path, caplog):
    (tmp_path / "text.txt").write_text("the lamp of a small ship went out. " * 60)
    tokenizer, cache = Tokenizer.gpt2(300), tmp_path / "cache"

    def prepared() -> corpus.Corpus:
        return corpus.prepare([tmp_path / "text.txt"], tokenizer, workers=1, cache_dir=cache)

    expected = prepared()
    (folder,) = (path.parent for path in cache.glob(f"*/{corpus.WHOLE}"))
    for name in sorted(path.name for path in folder.glob("*.json")):
        for spelled in each_spoiled(folder / name):
            try:
                found = prepared()
            except Exception as problem:
                raise AssertionError(f"{name} as {spelled[:300]}") from problem
            assert list(found.train.tokens) == list(expected.train.tokens), spelled
