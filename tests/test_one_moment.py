"""What is read while its files are replaced is wholly of one state, or one error that says what to
do.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_models import randomise
from minigpt2 import lora
from minigpt2.decoding import ready
from minigpt2.decoding.ready import load, load_with_tokenizer
from minigpt2.errors import InputError
from minigpt2.formats import hugging_face, tensors, vocabulary
from minigpt2.lora import add_lora, save_adapter
from minigpt2.model import GPT2, GPT2Config
from minigpt2.system import files
from minigpt2.system.files import UnsettledError
from minigpt2.tokenizer import Tokenizer
from scripts import run_here

KINDS = ["whole", "sharded", "pickle", "adapter"]
WAYS = ["by renaming", "in place"]
# of an adapter with two layers: its 16 matrices are read, and then the base, folded as it is read
HALF_READ = {"the adapter": 6, "the base": 22}


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr(files, "WAITS", (0,) * len(files.WAITS))


def whole(folder, seed, **changes):
    """A model folder with its tokenizer, other values in every tensor for every seed."""
    shape = {"vocab_size": 300, "block_size": 17, "n_embd": 14, "n_layer": 2, "n_head": 2}
    made = GPT2(GPT2Config(**{**shape, **changes}))
    randomise(made, seed=seed)
    made.save_pretrained(folder, Tokenizer.gpt2(made.config.vocab_size))
    return folder


def sharded(folder, seed):
    tensors = load_file(whole(folder, seed) / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {f"model-{n}-of-2.safetensors": [*tensors][n - 1 :: 2] for n in (1, 2)}
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / shard, {"format": "pt"})
    places = {name: shard for shard, names in shards.items() for name in names}
    index = json.dumps({"weight_map": places})
    (folder / "model.safetensors.index.json").write_text(index)
    return folder


def pickle(folder, seed):
    torch.save(load_file(whole(folder, seed) / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def adapter(folder, seed):
    """Adapters that differ, on the same base."""
    base = folder.parent / "base"
    if not base.exists():
        whole(base, 0)
    made = GPT2.from_pretrained(base)
    add_lora(made, rank=3, alpha=7.0, generator=torch.Generator().manual_seed(seed))
    for part in lora.adapters(made).values():
        torch.nn.init.normal_(part.lora_B, generator=torch.Generator().manual_seed(-seed % 97))
    save_adapter(made, folder, base_model=str(base))
    Tokenizer.gpt2(300).save(folder)
    return folder


@pytest.fixture
def states(tmp_path):
    """A function that makes two folders of a kind, which share no value, and a third that is the
    first to begin with.
    """

    def make(kind):
        first, second = (globals()[kind](tmp_path / name, n + 1) for n, name in enumerate("ab"))
        return first, second, shutil.copytree(first, tmp_path / "now")

    return make


def replace(folder, by, way):
    """Make a folder's files those of another one, as `mv` or as `cp` does it."""
    for path in by.iterdir():
        if way == "in place":
            (folder / path.name).write_bytes(path.read_bytes())
        else:
            shutil.copy(path, folder / f"{path.name}.new")
            (folder / f"{path.name}.new").replace(folder / path.name)


def before_read(monkeypatch, act):
    """Call `act` with the number of tensors read so far before each that is read; a pickle, which
    is opened once, is counted by its tensors, too.
    """
    read = []

    def watched(make):
        def made(*where):
            take = make(*where)

            def reader():
                read.append(None)
                act(len(read) - 1)
                return take()

            return reader

        return made

    for name in ("_reader", "_copier"):
        monkeypatch.setattr(tensors, name, watched(getattr(tensors, name)))
    return read


def unguarded(monkeypatch):
    """Read once, whatever happens meanwhile."""
    for module in (hugging_face, ready, files):
        monkeypatch.setattr(module, "at_one_moment", lambda folder, names, read: read())


def values(loaded):
    """All that a model computes with, packed or not."""
    idx = torch.arange(17)[None]
    with torch.no_grad():
        return [loaded.wte(idx), loaded.wpe(idx), loaded.hidden(idx), loaded(idx)]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(values(left), values(right)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("take", [GPT2.from_pretrained, load], ids=["plain", "to decode"])
def test_a_model_is_of_one_state_wherever_its_files_were_replaced(
    states, monkeypatch, take, kind, way
):
    first, second, now = states(kind)
    expected = [take(folder) for folder in (first, second)]
    assert not same(*expected)
    with monkeypatch.context() as patch:
        read = before_read(patch, lambda n: None)
        take(now)
    for at in (1, len(read) // 2, len(read) - 1):
        replace(now, first, way)
        with monkeypatch.context() as patch:
            before_read(patch, lambda n, at=at: n == at and replace(now, second, way))
            found = take(now)
        assert same(found, expected[1])


def test_unguarded_it_would_be_a_mixture(states, monkeypatch):
    first, second, now = states("whole")
    before_read(monkeypatch, lambda n: n == 5 and replace(now, second, "by renaming"))
    unguarded(monkeypatch)
    found = GPT2.from_pretrained(now)
    assert not any(same(found, GPT2.from_pretrained(folder)) for folder in (first, second))


def before_layout(monkeypatch, act):
    """Call `act` once, before matrices are rounded or laid out."""
    done = []

    def first(step):
        def taken(made, **options):
            if not done:
                done.append(act())
            step(made, **options)

        return taken

    for name in ("quantize", "pack"):
        monkeypatch.setattr(ready, name, first(getattr(ready, name)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_file_that_changes_while_its_matrices_are_laid_out_is_noticed(
    states, monkeypatch, dtype, way
):
    _, second, now = states("whole")
    expected = load(second, device="cpu", dtype=dtype)
    before_layout(monkeypatch, lambda: replace(now, second, way))
    assert same(load(now, device="cpu", dtype=dtype), expected)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_unguarded_a_layout_would_be_a_mixture(states, monkeypatch, dtype):
    first, second, now = states("whole")
    expected = [load(folder, device="cpu", dtype=dtype) for folder in (first, second)]
    before_layout(monkeypatch, lambda: replace(now, second, "in place"))
    unguarded(monkeypatch)
    found = load(now, device="cpu", dtype=dtype)
    assert not any(same(found, one) for one in expected)


def test_a_loaded_model_has_left_its_file(states, monkeypatch):
    _, second, now = states("whole")
    for runs in (True, False):  # where nothing can be laid out anew, too
        monkeypatch.setattr("minigpt2.decoding.cpu_layout.works", lambda *_, runs=runs: runs)
        found = load(now, device="cpu")
        before = values(found)
        replace(now, second, "in place")
        assert all(torch.equal(a, b) for a, b in zip(before, values(found)))


@pytest.mark.parametrize("way", WAYS)
def test_another_shape_is_not_taken_for_damage(states, tmp_path, monkeypatch, way):
    _, _, now = states("whole")
    wide = whole(tmp_path / "wide", 5, n_embd=22)
    before_read(monkeypatch, lambda n: n == 3 and replace(now, wide, way))
    assert same(GPT2.from_pretrained(now), GPT2.from_pretrained(wide))


@pytest.mark.parametrize("at", HALF_READ.values(), ids=[*HALF_READ])
def test_base_and_adapter_that_are_replaced_together_are_of_one_state(states, monkeypatch, at):
    _, _, now = states("adapter")
    base = now.parent / "base"
    old = GPT2.from_pretrained(now)
    other = whole(now.parent / "other", 9)

    def exchange(n):
        if n == at:
            replace(base, other, "by renaming")
            made = GPT2.from_pretrained(base)
            add_lora(made, rank=3, alpha=7.0)
            save_adapter(made, now, base_model=str(base))

    with monkeypatch.context() as patch:
        before_read(patch, exchange)
        found = GPT2.from_pretrained(now)
    assert same(found, GPT2.from_pretrained(now)) and not same(found, old)


@pytest.mark.parametrize("at", HALF_READ.values(), ids=[*HALF_READ])
def test_a_base_that_is_replaced_alone_is_refused_by_its_digest(states, monkeypatch, at):
    _, _, now = states("adapter")
    other = whole(now.parent / "other", 9)
    base = now.parent / "base"
    before_read(monkeypatch, lambda n: n == at and replace(base, other, "by renaming"))
    with pytest.raises(InputError, match="was trained on"):
        GPT2.from_pretrained(now)


def test_even_unguarded_the_digest_is_that_of_the_values_that_are_folded(states, monkeypatch):
    _, _, now = states("adapter")
    other = whole(now.parent / "other", 9)
    base = now.parent / "base"
    before_read(monkeypatch, lambda n: n == 22 and replace(base, other, "in place"))
    unguarded(monkeypatch)
    with pytest.raises(InputError, match="was trained on"):
        GPT2.from_pretrained(now)


def in_two_files(tokenizer, folder):
    """Save a tokenizer without the tokenizer.json that has all in one."""
    tokenizer.save(folder)
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize("way", WAYS)
def test_a_tokenizer_is_of_one_state(tmp_path, monkeypatch, way):
    now, other = tmp_path / "now", tmp_path / "other"
    in_two_files(Tokenizer.gpt2(300), now)
    in_two_files(Tokenizer.gpt2(400), other)
    read, done = files.read_json, []

    def reading(path):
        value = read(path)
        if path.name == "vocab.json" and not done:
            done.append(replace(now, other, way))
        return value

    monkeypatch.setattr(vocabulary.files, "read_json", reading)
    assert Tokenizer.from_pretrained(now).identity == Tokenizer.gpt2(400).identity
    replace(now, other, way)
    done.clear()
    with pytest.raises(InputError, match="do the tokenizer files fit together"):
        in_two_files(Tokenizer.gpt2(300), now)
        Tokenizer.from_folder(now)  # which reads once


def test_model_and_tokenizer_are_of_one_state(tmp_path, monkeypatch):
    now, other = whole(tmp_path / "now", 1), whole(tmp_path / "other", 2, vocab_size=400)
    before_read(monkeypatch, lambda n: n == 2 and replace(now, other, "by renaming"))
    found, words = load_with_tokenizer(now, device="cpu")
    assert found.config.vocab_size == words.vocab_size == 400


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_a_conversion_is_of_one_state(states, monkeypatch, capsys, kind, way):
    _, second, now = states(kind)
    before_read(monkeypatch, lambda n: n == 9 and replace(now, second, way))
    result = run_here(capsys, "convert_weights", now, now.parent / "dest")
    assert result.code == 0
    assert same(GPT2.from_pretrained(now.parent / "dest"), GPT2.from_pretrained(second))


@pytest.mark.parametrize("take", [GPT2.from_pretrained, load, load_with_tokenizer])
def test_files_that_never_rest_are_one_error_that_says_what_to_do(states, monkeypatch, take):
    first, second, now = states("whole")
    turn = [first, second]
    read = before_read(
        monkeypatch, lambda n: n % 7 == 3 and replace(now, turn[n % 2], "by renaming")
    )
    with pytest.raises(UnsettledError) as caught:
        take(now)
    message = str(caught.value)
    assert message.startswith(f"{now} was changed each time that it was read: wait until nothing")
    assert "copy" in message and "\n" not in message
    n_tensors = len(load_file(first / "model.safetensors")) + 1  # the head is read as one more
    assert len(read) <= len(files.WAITS) * n_tensors, "no tries within tries"


def test_errors_of_files_that_stay_are_raised_at_once(states, monkeypatch):
    _, _, now = states("whole")
    (now / "tokenizer.json").write_text("{")
    (now / "model.safetensors").write_bytes(b"not weights")
    read, asked = hugging_face.read_config, []
    monkeypatch.setattr(hugging_face, "read_config", lambda folder: asked.append(1) or read(folder))
    with pytest.raises(InputError, match="cannot be read as weights"):
        GPT2.from_pretrained(now)
    assert len(asked) == 1
    with pytest.raises(InputError, match="not valid JSON"):
        Tokenizer.from_pretrained(now)


def test_a_file_that_is_empty_gets_a_second_look(states, monkeypatch):
    """`cp` empties a file, and some milliseconds later begins to fill it."""
    first, _, now = states("whole")
    path, looks = now / "model.safetensors", []
    path.write_bytes(b"")

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == fills_at:
            path.write_bytes((first / path.name).read_bytes())

    read, tries = hugging_face.read_config, []
    monkeypatch.setattr(hugging_face, "read_config", lambda folder: tries.append(1) or read(folder))
    monkeypatch.setattr(files, "TICK_NS", 0)
    monkeypatch.setattr(files.time, "sleep", sleep)
    fills_at = None
    with pytest.raises(InputError, match="an empty file"):
        GPT2.from_pretrained(now)
    assert len(tries) == 2
    looks.clear()
    fills_at = 2
    assert same(GPT2.from_pretrained(now), GPT2.from_pretrained(first))


def test_what_does_not_belong_to_the_model_may_change(states, monkeypatch):
    _, _, now = states("whole")

    def write(n):
        (now / "metrics.jsonl").write_text(str(n))
        (now / "run.json").write_text("{}")
        (now / f".model.safetensors.{n:08}.tmp").write_text("half")

    read = before_read(monkeypatch, write)
    GPT2.from_pretrained(now)
    assert len(read) == len(load_file(now / "model.safetensors"))
