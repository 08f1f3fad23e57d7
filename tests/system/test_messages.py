"""Whatever stands in a file, a name or a flag: what is said of it is in one line, and all of it can
be seen.
"""

import dataclasses
import json
import logging
import os
import re
import shutil
import sys
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minigpt2.cli.console import explain, printable, run_script, show_traceback
from minigpt2.corpus.options import CorpusOptions
from minigpt2.errors import InputError
from minigpt2.formats.tensors import read_tensors, write_tensors
from minigpt2.system.messages import HIDDEN, MessageFormatter, one_line, visible, without_secrets
from scripts import run_here, tiny_folder

pytestmark = pytest.mark.skipif(os.name == "nt", reason="such names cannot be on Windows")

# a title and an answer-back of the terminal, C1's CSI, a turned direction, line ends of every kind
HOSTILE = [
    "\x1b]0;owned\x07\x1b[2J\x1b[c",
    "\x9b2J\x90q\x9c",
    "x\nerror: forged\r\x0b\x0c\x85\u2028\u2029error: forged",
    "\u202egpj.exe\u2066\u200e\u200b\ufeff\x7f\x00",
]


@given(st.text(st.characters(exclude_categories=[])))
def test_all_of_a_line_can_be_seen(text):
    line = one_line(text)
    assert line.isprintable()
    assert visible(line) == line


@given(st.text(st.characters(codec="utf-8", exclude_characters="\\")))
def test_what_is_visible_says_what_was_there(text):
    assert re.sub(r"\\(x..|u....|U.{8}|[nrt])", _read, visible(text)) == text
    assert visible(text, keep=text) == text


def _read(escape):
    kind, rest = escape[1][0], escape[1][1:]
    return {"n": "\n", "r": "\r", "t": "\t"}[kind] if not rest else chr(int(rest, 16))


SECRET = [
    ("cannot get x from http://me:pass@host/a", "cannot get x from http://***@host/a"),
    ("http://me:p@ss/w:rd@host:80", "http://***@host:80"),
    ("https://token@host and https://host", "https://***@host and https://host"),
    ("proxy socks5h://me:pass@host", "proxy socks5h://***@host"),
    ("hf://datasets/a/b@main/c.txt", "hf://datasets/a/b@main/c.txt"),
    ("https://cdn/x?X-Amz-Signature=abc&n=1&Policy=p", "https://cdn/x?X-Amz-Signature=***&n=1&Policy=***"),
    ("Authorization: Bearer hunter2", "Authorization: Bearer ***"),
    (f"hf_{'aB3' * 12} is a token, hf_models.py is none", "*** is a token, hf_models.py is none"),
    ("a@b.c: mail", "a@b.c: mail"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "shown"), SECRET, ids=lambda text: text[:20])
def test_secrets_of_addresses_are_not_shown(text, shown):
    assert without_secrets(text) == shown
    assert without_secrets(shown) == shown


@pytest.mark.parametrize("name", ["HTTP_PROXY", "https_proxy", "ALL_PROXY", "HF_ENDPOINT"])
@pytest.mark.parametrize("scheme", ["http://", "socks5://", ""])
def test_what_the_environment_holds_is_not_shown_however_it_is_written(name, scheme, monkeypatch):
    monkeypatch.setenv(name, f"{scheme}me:my%20pass@host:80")
    for text in ("my%20pass", "my pass", "me:my%20pass@host", "port of 'me:my pass'"):
        assert "pass" not in without_secrets(text) and HIDDEN in without_secrets(text)
    assert without_secrets("mine, me and my passage") == f"mine, me and {HIDDEN}age"
    assert without_secrets("me, a password") == "me, a password"


def test_the_token_is_not_shown(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "my-own-token ")
    assert one_line("got 'my-own-token'") == "got '***'"


def seen(text):
    """The lines of an output, when all of it can be seen."""
    assert visible(text, keep="\n") == text
    return text.splitlines()


def rewrite(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def data_name(folder, text):
    return "train", "--data", folder / f"{text}.txt"


def no_text_in_data(folder, text):
    path = folder / f"{text}.txt"
    path.touch()
    return "train", "--data", path


def json_field(folder, text):
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({text: "One lamp"}) + "\n")
    return "train", "--data", path


def text_field(folder, text):
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({"text": "One lamp"}) + "\n")
    return "train", "--data", path, "--text-field", text


def value_of_a_field(folder, text):
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({"text": [text]}) + "\n")
    return "train", "--data", path


def broken_json(folder, text):
    path = folder / "rows.jsonl"
    path.write_text('{"text": ' + text)
    return "train", "--data", path


def column(folder, text):
    path = folder / "rows.csv"
    quoted = text.replace('"', '""')
    path.write_text(f'"{quoted}",b\nOne,lamp\n')
    return "train", "--data", path


def csv_columns(folder, text):
    (folder / "rows.csv").write_text("a,b\nOne,lamp\n")
    return "train", "--data", folder / "rows.csv", "--csv-columns", text


def parquet_column(folder, text):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({text: ["One lamp"]}), folder / "rows.parquet")
    return "train", "--data", folder / "rows.parquet"


def model_name(folder, text):
    return "sample", "--prompt", "a", "--model", text


def model_folder(folder, text):
    path = folder / text
    path.mkdir()
    return "sample", "--prompt", "a", "--model", path


def _sampled(folder):
    return "sample", "--prompt", "a", "--model", folder / "model"


def config_value(name):
    def place(folder, text):
        rewrite(folder / "model" / "config.json", **{name: text})
        return _sampled(folder)

    place.__name__ = f"config_{name}"
    return place


def config_field(folder, text):
    (folder / "model" / "config.json").write_text(json.dumps({text: text}))
    return _sampled(folder)


def tensor_name(folder, text):
    path = folder / "model" / "model.safetensors"
    tensors, _ = read_tensors(path)
    write_tensors(path, {**tensors, text.replace("\0", ""): torch.zeros(3)})
    return _sampled(folder)


def tensor_name_of_a_pickle(folder, text):
    path = folder / "model" / "model.safetensors"
    tensors, _ = read_tensors(path)
    torch.save({**tensors, text: torch.zeros(3)}, path.with_name("pytorch_model.bin"))
    path.unlink()
    return _sampled(folder)


def shard_name(folder, text):
    path = folder / "model" / "model.safetensors"
    path.unlink()
    index = {"weight_map": {"wte.weight": text}}
    path.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    return _sampled(folder)


def word(folder, text):
    path = folder / "model" / "vocab.json"
    *words, _, eot = json.loads(path.read_text())
    path.write_text(json.dumps({w: n for n, w in enumerate([*words, text, eot])}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / name).unlink(missing_ok=True)
    return _sampled(folder)


def merge(folder, text):
    with (folder / "model" / "merges.txt").open("a", newline="") as file:
        file.write(f"{text.split()[0]} {text} \n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / name).unlink(missing_ok=True)
    return _sampled(folder)


def _tokenizer_json(folder, **values):
    """A tokenizer in one file."""
    model = folder / "model"
    vocab = json.loads((model / "vocab.json").read_text())
    whole = {
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
    }
    for path in (model / "vocab.json", model / "merges.txt"):
        path.unlink()
    (model / "tokenizer.json").write_text(json.dumps({**whole, **values}))
    return _sampled(folder)


def added_word(folder, text):
    return _tokenizer_json(folder, added_tokens=[{"id": 99999, "content": text, "special": True}])


def kind_of_tokenizer(folder, text):
    return _tokenizer_json(folder, model={"type": text, "vocab": {}, "merges": []})


def step_of_tokenizer(folder, text):
    return _tokenizer_json(folder, normalizer={"type": text}, pre_tokenizer={"type": text})


def adapter_value(name):
    def place(folder, text):
        path = folder / "model"
        (path / "config.json").unlink()
        values = {"base_model_name_or_path": "gpt2", "peft_type": "LORA", "r": 2, "lora_alpha": 2}
        adapter = {**values, "target_modules": ["c_attn"], name: text}
        (path / "adapter_config.json").write_text(json.dumps(adapter))
        return _sampled(folder)

    place.__name__ = f"adapter_{name}"
    return place


def prompt_file(folder, text):
    return "sample", "--prompt-file", folder / text, "--model", folder / "model"


def prompts_that_are_no_json(folder, text):
    path = folder / f"{text}.jsonl"
    path.write_text(f'{{"{text.encode("unicode_escape").decode()}"\n')
    return "sample", "--prompts-file", path, "--model", folder / "model"


def flag(folder, text):
    return "sample", f"--{text}"


def flag_value(name):
    def place(folder, text):
        return "sample", "--prompt", "a", f"--{name}={text}", "--model", folder / "model"

    place.__name__ = f"flag_{name}"
    return place


def source_name(folder, text):
    return "convert_weights", folder / text, folder / "dest"


def dest_name(folder, text):
    (folder / text).touch()
    return "convert_weights", folder / "model", folder / text


def out_name(folder, text):
    data = folder / "data.txt"
    data.write_text("One lamp")
    (folder / text).touch()
    return "train", "--data", data, "--out", folder / text


def owner_of_the_run(folder, text):
    from minigpt2.system import files

    run = folder / "run"
    run.mkdir()
    held = files.lock(run / "run.lock", wait=False)
    (run / "run.owner").write_text(text)
    data = folder / "data.txt"
    data.write_text("One lamp")
    place = "train", "--data", data, "--out", run
    return (*place, held)


def kept_state(folder, text):
    step = folder / "run" / "checkpoints" / "step-000003"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text(json.dumps({"files": {text: {"size": 1, "sha256": text}}}))
    data = folder / "data.txt"
    data.write_text("One lamp")
    return "train", "--data", data, "--out", folder / "run", "--resume"


PLACES = [
    data_name, no_text_in_data, json_field, text_field, value_of_a_field, broken_json, column,
    csv_columns, parquet_column, model_name, model_folder, config_field, tensor_name,
    tensor_name_of_a_pickle, shard_name, word, merge, added_word, kind_of_tokenizer,
    step_of_tokenizer, prompt_file,
    prompts_that_are_no_json, flag, source_name, dest_name, out_name, owner_of_the_run, kept_state,
    *map(config_value, ["model_type", "activation_function", "n_layer", "vocab_size",
                        "tie_word_embeddings", "quantization_config"]),
    *map(adapter_value, ["base_model_name_or_path", "peft_type", "target_modules", "bias", "r"]),
    *map(flag_value, ["device", "dtype", "max-new-tokens", "temperature", "draft"]),
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.parametrize("text", HOSTILE, ids=["terminal", "C1", "lines", "directions"])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_an_error_is_one_line_that_can_be_seen(
    place, text, tmp_path, tiny_model, capsys, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "cache"))
    shutil.copytree(tiny_model, tmp_path / "model")
    named = place.__name__ in NAMES
    script, *argv = place(tmp_path, text.replace("\0", "") if named else text)
    result = run_here(capsys, script, *(word for word in argv if not hasattr(word, "release")))
    assert result.out == ""
    *notices, error = seen(result.err)
    assert result.code == 2 and error.startswith("error: "), result.err
    assert not any(notice.startswith("error:") for notice in notices)


NAMES = {
    place.__name__
    for place in (data_name, no_text_in_data, model_name, model_folder, prompt_file, source_name,
                  dest_name, out_name, prompts_that_are_no_json)
} | {"flag_draft"}  # fmt: skip


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["table", "json"])
@pytest.mark.parametrize("text", HOSTILE, ids=["terminal", "C1", "lines", "directions"])
def test_the_report_on_a_text_can_be_seen(text, more, tmp_path, capsys, monkeypatch):
    from minigpt2.cli.corpus import main

    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "cache"))
    paths, text = [], text.replace("\0", "")
    for name in ("train", "val"):
        paths.append(tmp_path / f"{name}{text}.txt")
        paths[-1].write_text(f"{name}{text}" + "".join(f"One lamp, {n} oars. " for n in range(99)))
    argv = [str(paths[0]), "--val-data", str(paths[1]), "--preset", "nano", *more]
    assert run_script(main, CorpusOptions, argv, positional=True) == 0
    out, err = capsys.readouterr()
    lines = seen(out) + seen(err)
    assert not any(line.lstrip().startswith("error:") for line in lines)
    if more:
        (line,) = out.splitlines()
        assert json.loads(line)["leaks"] == [[str(paths[1]), str(paths[0])]]


def test_only_our_own_text_has_line_ends_in_notices():
    record = logging.LogRecord(
        "x",
        logging.INFO,
        "",
        0,
        "a table\n  of %s: %d %5.1f %s",
        ("\x1b[2J\nx", 3, 2.5, None),
        None,
    )
    assert MessageFormatter().format(record) == "a table\n  of \\x1b[2J\\nx: 3   2.5 None"
    assert record.args == ("\x1b[2J\nx", 3, 2.5, None)  # other handlers have theirs
    named = logging.LogRecord("x", logging.INFO, "", 0, "%(name)s", ({"name": "\x9b"},), None)
    assert MessageFormatter().format(named) == "\\x9b"


def test_a_traceback_and_a_warning_can_be_seen(capsys, monkeypatch):
    def main(options):
        warnings.warn("\x1b[2J\nfrom http://me:pass@host", stacklevel=1)
        raise KeyError("\x1b[2J")  # a bug

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        try:
            run_script(main, CorpusOptions, ["x"], positional=True)
        except KeyError as problem:
            assert sys.excepthook is show_traceback
            chained = InputError(f"\x9b at http://me:pass@host: {problem}")
            sys.excepthook(InputError, chained, problem.__traceback__)
    err = capsys.readouterr().err
    lines = seen(err)
    assert lines[0] == "from http://***@host" or lines[0] == "\\x1b[2J from http://***@host"
    assert lines[1] == "Traceback (most recent call last):"
    assert lines[-1].endswith(r"InputError: \x9b at http://***@host: '\x1b[2J'")


def test_what_the_system_says_of_a_name_can_be_seen(tmp_path):
    with pytest.raises(OSError) as caught:
        (tmp_path / "\x1b[2J\n" / "x").touch()
    assert seen(explain(caught.value)) == [f"{tmp_path}/\\x1b[2J /x: No such file or directory"]


@dataclasses.dataclass
class Stream:
    terminal: bool

    def isatty(self):
        return self.terminal


@pytest.mark.parametrize("text", HOSTILE)
def test_a_result_is_whole_in_a_file_and_harmless_on_a_terminal(text):
    assert printable(text, Stream(False)) == text
    shown = printable(text, Stream(True))
    assert len(shown) == len(text)
    assert not set("\x1b\x9b\x90\x9c\x00\x07\x7f\r\u202e\u2066") & set(shown)
    kept = "\tאב\u200f, e\u0301, \u200d\n"
    assert printable(kept, Stream(True)) == kept
