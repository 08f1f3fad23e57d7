"""The three scripts as they are typed: results, messages and exit codes."""

import csv
import gzip
import json
import lzma
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

import warm
from languages import text_in
from minigpt2.cli import corpus as corpus_command
from minigpt2.cli import train as train_command
from minigpt2.formats.tensors import read_tensors, write_tensors
from minigpt2.model import GPT2
from minigpt2.system.processes import World
from minigpt2.tokenizer import Tokenizer
from minigpt2.training.options import TrainOptions
from scripts import ROOT, run_alone, run_here, tiny_folder, words_of
from text_files import give_stdin, lamp_lines
from tokenizer_folders import preferring, with_words, word
from vocabularies import hf_reads

TEXT = "".join(lamp_lines(60))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "lamps.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "cache"))


SAID_OF_TRAINING = [
    ("--lora-rank 15", "--lora-rank is 15, no matrix of this model has more than rank 14"),
    ("--document-mask", "--document-mask changes nothing: the training text is one document"),
    ("--patience 9", "--patience is 9, the run has 2 evaluations: it cannot stop"),
    ("--text-field body", "--text-field changes nothing: no file has rows with fields"),
    ("--batch-size 999", "a step is 999 sequences, the training text"),
]


@pytest.mark.parametrize(("more", "message"), SAID_OF_TRAINING)
def test_settings_without_effect_are_said_and_the_run_goes_on(
    capsys, tmp_path, text, model, more, message
):
    short = ["--max-steps", 2, "--batch-size", 2][: 2 if "--batch-size" in more else 4]
    result = train(capsys, text, tmp_path / "run", "--model", model, *short, *more.split())
    assert result.code == 0 and result.err.count(message) == 1, result.err
    plain = train(capsys, text, tmp_path / "plain", "--model", model, "--max-steps", 2)
    assert message not in plain.err


def test_separators_and_fields_are_for_files_of_their_kind(capsys, tmp_path, model):
    rows = tmp_path / "a.jsonl"
    rows.write_text('{"body": "The lamp is lit, and the sea is out."}\n' * 40)
    flags = ["--model", model, "--max-steps", 1, "--text-field", "body"]
    result = train(capsys, rows, tmp_path / "run", *flags, "--document-separator", "x")
    assert result.code == 0
    assert "--document-separator changes nothing: it is for plain text" in result.err
    assert "--text-field changes nothing" not in result.err


def test_one_device_for_all_processes_is_refused(capsys, tmp_path, text, model, monkeypatch):
    torchruns = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1"}
    for name, value in {**torchruns, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    result = train(capsys, text, tmp_path / "run", "--model", model, "--device", "cuda:1")
    assert result.code == 2 and "--device is cuda:1 with 2 processes" in result.last_line


def train(capsys, text, out, *more):
    return run_here(capsys, "train", "--data", text, "--out", out, *more)


def sample(capsys, model, *more):
    return run_here(capsys, "sample", "--model", model, *more)


# every refusal: (arguments, what the one line says); {model}, {text}, {tmp} are filled in
REFUSED_TRAINING = [
    ("--data {text} --model {model} --learning-rate -1", "--learning-rate is -1.0, allowed is"),
    ("--data {text} --model {model} --block-size 24", "--block-size is 24, the model has 23"),
    ("--data {text} --model {model} --device tpu", "--device is 'tpu', allowed is auto"),
    ("--data {text} --model {model} --device cpu --dtype float16", "float32, bfloat16"),
    ("--data {text} --model {model} --out {text}", "which is a file: name a folder"),
    ("--data {text} --model {model} --out {model}", "already holds a run or a model"),
    ("--data {text} --model {model} --out {tmp}/new --resume", "holds no checkpoint"),
    ("--data {tmp}/none.txt --model {model}", "none.txt"),
    ("--data {tmp}/*.md --model {model}", "*.md"),
    ("--data {tmp}/empty.txt --model {model}", "empty.txt"),
    ("--data {tmp}/rows.jsonl --model {model}", "rows.jsonl:row 1 has no field 'text'"),
    ("--data {tmp}/rows.jsonl --text-field n --model {model}", "a number in 'n'"),
    (
        "--data {text} --model {model} --mask-prompt",
        "--mask-prompt: no row is a chat, or has the fields prompt",
    ),
    ("--data {text} --model {model} --document-separator=", "--document-separator is empty"),
    ("--data {text} --model {model} --min-characters -1", "--min-characters is -1"),
    ("--data {text} --model {model} --min-characters 999999", "--min-characters"),
    ("--data {text} --model {model} --workers 0", "--workers is 0, allowed is 1 or more"),
    ("--data {tmp}/latin1.txt --model {model}", "latin1.txt"),
    ("--data {tmp}/utf16.txt --model {model}", "UTF-16"),
    ("--data {tmp}/binary.dat --model {model}", "binary.dat"),
    ("--data {text} --model {tmp}/nowhere", "nowhere"),
    ("--data {text} --model {tmp}/empty_folder", "config.json"),
    ("--data {text} --model {model} --lora-rank -1", "--lora-rank is -1, allowed is 0 (off)"),
    ("--data {text} --model {model} --lora-alpha 4", "--lora-alpha is given without --lora-rank"),
    ("--data {text} --model {model} --merge-lora", "--merge-lora is given without --lora-rank"),
    ("--data {text} --preset nano --lora-rank 4", "--preset starts without: choose one"),
    ("--data {text} --model {model} --lora-rank 4 --fsdp", "--lora-rank with --fsdp"),
    ("--data {text} --model {model} --fsdp", "start them with torchrun"),
    ("--data {text} --model {model} --val-fraction 0 --patience 1", "--patience needs held-out"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED_TRAINING)
def test_training_refuses_in_one_line_with_exit_code_2(
    capsys, tmp_path, text, model, line, message
):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "rows.jsonl").write_text('{"n": 1}')
    (tmp_path / "latin1.txt").write_bytes("caf\u00e9 au lait ".encode("latin-1") * 40)
    (tmp_path / "utf16.txt").write_bytes(TEXT.encode("utf-16"))
    (tmp_path / "binary.dat").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "empty_folder").mkdir()
    argv = line.format(text=text, model=model, tmp=tmp_path).split()
    if "--out" not in argv:
        argv += ["--out", str(tmp_path / "run")]
    result = run_here(capsys, "train", *argv)
    assert result.code == 2, result.err
    assert result.last_line.startswith("error: ")
    assert message in result.last_line
    assert "Traceback" not in result.err
    assert result.out == ""


REFUSED_SAMPLING = [
    ("--prompt x --model {model} --temperature -1", "--temperature is -1.0, allowed is 0 or more"),
    ("--prompt x --model {model} --temperature nan", "--temperature is nan"),
    ("--prompt x --model {model} --top-k -1", "--top-k is -1, allowed is 0 (off) or more"),
    ("--prompt x --model {model} --top-p 1.5", "--top-p is 1.5, allowed is from 0 to 1"),
    ("--prompt x --model {model} --max-new-tokens -1", "--max-new-tokens is -1"),
    ("--prompt x --model {model} --num-samples 0", "--num-samples is 0"),
    ("--prompt x --model {poisoned}", "scores are not finite at new token 1"),
    ("--prompt x --model {mismatched}", "the tokenizer has 300 ids, the model 290"),
    ("--prompt-file {tmp}/none.txt --model {model}", "none.txt does not exist"),
    ("--prompt-file {tmp}/latin1.txt --model {model}", "not UTF-8 at byte 3"),
    ("--prompt x --model {tmp}/nowhere", "nowhere"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED_SAMPLING)
def test_sampling_refuses_in_one_line_with_exit_code_2(capsys, tmp_path, model, line, message):
    poisoned = GPT2.from_pretrained(model)
    with torch.no_grad():
        poisoned.h[0].mlp.c_fc.weight[0, 0] = float("nan")
    poisoned.save_pretrained(tmp_path / "poisoned", Tokenizer.gpt2(300))
    tiny_folder(tmp_path / "mismatched", vocab_size=290)
    Tokenizer.gpt2(300).save(tmp_path / "mismatched")
    (tmp_path / "latin1.txt").write_bytes("caf\u00e9".encode("latin-1"))
    names = {"model": model, "tmp": tmp_path}
    names |= {name: tmp_path / name for name in ("poisoned", "mismatched")}
    result = run_here(capsys, "sample", *line.format(**names).split())
    assert result.code == 2, result.err
    assert result.last_line.startswith("error: ")
    assert message in result.last_line
    assert "Traceback" not in result.err


def hostile(tmp_path, model):
    """Folders of models that cannot be built, each with what is said of it."""

    def changed(name, file, **values):
        path = shutil.copytree(model, tmp_path / name)
        if file == "config.json":
            values = {**json.loads((path / file).read_text()), **values}
        (path / file).write_text(json.dumps(values))
        if file == "adapter_config.json":
            (path / "config.json").unlink()
            (path / "model.safetensors").unlink()
            write_tensors(path / "adapter_model.safetensors", {"of nothing": torch.ones(1)})
        return path

    lora = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["c_attn"]}
    deep = changed("deep", "config.json", n_layer=10**6)
    wide = changed("wide", "config.json", n_embd=2**31, n_head=2**31)
    for name, base in {"a": "b", "b": "a", "itself": "itself", "on-deep": "deep"}.items():
        base = tmp_path / base
        changed(name, "adapter_config.json", **lora, base_model_name_or_path=str(base))
    return [
        (deep, f"{deep}/config.json does not fit {deep}/model.safetensors: n_layer is 1,000,000"),
        (wide, f"{wide}/config.json does not fit {wide}/model.safetensors: n_embd is 2,147"),
        (tmp_path / "a", f"never come to a model: {tmp_path / 'a'} on {tmp_path / 'b'}"),
        (tmp_path / "itself", f"{tmp_path / 'itself'}/adapter_config.json names its own folder"),
        (tmp_path / "on-deep", f"{deep}/config.json"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "sample --prompt x --model {path}",
        "sample --prompt x --model {model} --draft {path}",
        "train --data {text} --out {new} --model {path}",
        "train --data {text} --out {new} --model {path} --lora-rank 2",
        "convert_weights {path} {new}",
    ],
)
def test_a_model_that_cannot_be_built_is_refused_before_it_is(
    capsys, tmp_path, text, model, monkeypatch, line
):
    def built(*_):
        raise AssertionError("a block was built")

    for path, message in hostile(tmp_path, model):
        words = line.format(path=path, model=model, text=text, new=tmp_path / "new").split()
        with monkeypatch.context() as patch:
            if "--draft" not in words:  # the other model is built
                patch.setattr("minigpt2.model.Block.__init__", built)
            result = run_here(capsys, *words)
        assert result.code == 2, result.err
        assert message in result.last_line
        assert "Traceback" not in result.err


def test_a_bug_of_ours_is_no_users_fault(capsys, model, monkeypatch):
    monkeypatch.setattr(GPT2, "from_pretrained", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(capsys, model, "--prompt", "x")


def test_debug_shows_where_an_error_came_from(tmp_path):
    result = run_alone("sample", "--prompt", "x", "--model", tmp_path / "nowhere", "--debug")
    assert result.code != 0 and "Traceback" in result.err


SENTENCES = [f"The lamp {n} is lit, and {n} boats are out.\n" for n in range(40)]


def same_text(tmp_path):
    """The same forty documents in many shapes: name -> (flags, stdin)."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number, sentence in enumerate(SENTENCES):
        (folder / f"{number:02}.txt").write_text(sentence)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": s}) + "\n" for s in SENTENCES))
    (tmp_path / "a.json").write_text(json.dumps([{"body": s} for s in SENTENCES], indent=1))
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerows([["n", "text"], *enumerate(SENTENCES)])
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write((tmp_path / "a.jsonl").read_bytes())
    together = "***\n".join(SENTENCES)
    (tmp_path / "one.txt").write_text(together)
    (tmp_path / "one.txt.xz").write_bytes(lzma.compress(together.encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": SENTENCES}), tmp_path / "a.parquet")
    separated = ["--document-separator", r"***\n"]
    return {
        "folder": ([folder], b""),
        "glob": ([folder / "*.txt"], b""),
        "jsonl": ([tmp_path / "a.jsonl"], b""),
        "json": ([tmp_path / "a.json", "--text-field", "body"], b""),
        "csv": ([tmp_path / "a.csv"], b""),
        "tsv": ([tmp_path / "a.tsv"], b""),
        "parquet": ([tmp_path / "a.parquet"], b""),
        "gzip": ([tmp_path / "a.jsonl.gz"], b""),
        "separator": ([tmp_path / "one.txt", *separated], b""),
        "xz": ([tmp_path / "one.txt.xz", *separated], b""),
        "stdin": (["-", *separated], together.encode()),
    }


def test_the_same_text_in_any_shape_makes_the_same_token_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "cache"))
    seen = {}
    for name, (argv, stdin) in same_text(tmp_path).items():
        give_stdin(monkeypatch, stdin)
        code, shown = corpus_command.run([*map(str, argv), "--json"]), capsys.readouterr()
        assert code == 0, shown.err
        assert json.loads(shown.out)["documents"] == 40
        for folder in (tmp_path / "cache" / "tokens").glob("[!.]*"):
            files = [(folder / part).read_bytes() for part in ("train.bin", "val.bin")]
            seen[name] = files
            shutil.rmtree(folder)
    assert len(seen) == 11
    assert all(files == seen["folder"] for files in seen.values())


def test_a_text_shorter_than_the_window_shortens_it_and_says_so(capsys, tmp_path, model):
    path = tmp_path / "short.txt"
    path.write_text("A lamp by the sea.")
    out = tmp_path / "run"
    argv = ["--data", path, "--model", model, "--out", out, "--max-steps", 2]
    result = run_here(capsys, "train", *argv)
    assert result.code == 0, result.err
    assert re.search(r"fewer than a window of 23: windows are of \d+, and longer", result.err)
    tiny = tmp_path / "tiny.txt"
    tiny.write_text("A")
    result = run_here(capsys, "train", "--data", tiny, *argv[2:4], "--out", tmp_path / "tiny")
    assert result.code == 0, result.err


def test_masks_reach_the_run_and_belong_to_it(capsys, tmp_path, model):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Lamp {n}?", "completion": f" Lit {n}."} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--data", path, "--model", model, "--max-steps", 2, "--dropout", 0]
    losses = {}
    for masks in ([], ["--mask-prompt"], ["--document-mask"], ["--mask-prompt", "--document-mask"]):
        out = tmp_path / ("run" + "".join(masks))
        result = run_here(capsys, "train", *argv, "--out", out, *masks)
        assert result.code == 0, result.err
        lines = (out / "metrics.jsonl").read_text().splitlines()
        losses[tuple(masks)] = json.loads(lines[0])["val_loss"]
    assert len(set(losses.values())) == 4
    off = ["--no-document-mask", "--resume"]
    result = run_here(capsys, "train", *argv, "--out", out, "--mask-prompt", *off)
    assert result.code == 2 and "--document-mask was True" in result.last_line


@pytest.mark.parametrize("script", ["train", "sample", "convert_weights"])
@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_come_at_once_without_torch_and_the_like(script, flag):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{script}.py', '{flag}']\n"
        "try:\n"
        f"    runpy.run_path('{script}.py', run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code\n"
        "heavy = {'torch', 'numpy', 'tiktoken', 'matplotlib', 'huggingface_hub', 'asyncio'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
        "assert len(sys.modules) < 400, 'many small modules take time too'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("usage: " if flag == "--help" else "minigpt2 0.") in done.stdout


@pytest.mark.usefixtures("drawn_pages")
def test_train_then_sample_then_resume(capsys, tmp_path, text, model):
    out = tmp_path / "run"
    settings = ["--model", model, "--batch-size", 3, "--eval-every", 2]
    result = train(capsys, text, out, *settings, "--max-steps", 4)
    assert result.code == 0, result.err
    assert result.out == ""
    best, untuned = r"val perplexity [\d,.]+, bits per byte [\d.]+", r"untuned [\d,.]+ and [\d.]+"
    assert re.search(rf"{best} \({untuned}\)", result.err)
    expected = "config.json model.safetensors vocab.json merges.txt tokenizer_config.json "
    expected += "generation_config.json metrics.jsonl samples.jsonl loss.png loss.svg "
    expected += "run.json report.html README.md"
    assert {path.name for path in out.iterdir()} >= set(expected.split())
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [0, 1, 2, 3, 4]
    assert [line["step"] for line in metrics if "bits_per_byte" in line] == [0, 2, 4]

    written = sample(capsys, out, "--prompt", "The 7th", "--max-new-tokens", 9)
    assert written.code == 0 and written.out.startswith("The 7th") and written.out.endswith("\n")

    assert train(capsys, text, out, *settings, "--max-steps", 4).code == 2
    again = train(capsys, text, out, *settings, "--max-steps", 4, "--resume")
    assert again.code == 0 and "nothing to do" in again.err
    longer = train(capsys, text, out, *settings, "--max-steps", 6, "--resume")
    assert longer.code == 0, longer.err
    lines = (out / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == [0, 1, 2, 3, 4, 5, 6]


def test_adapters_are_trained_resumed_sampled_and_merged(capsys, tmp_path, text, model):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    model = shutil.copytree(model, tmp_path / "base")
    settings = ["--model", model, "--lora-rank", 3, "--batch-size", 3, "--save-every", 2]
    settings += ["--max-steps", 4, "--eval-every", 2, "--learning-rate", 0.05, "--merge-lora"]
    for out in (whole, parts):
        assert train(capsys, text, out, *settings).code == 0
    assert not (whole / "model.safetensors").exists()
    assert "1,344 of them trained" in train(capsys, text, tmp_path / "said", *settings).err
    shutil.rmtree(parts / "checkpoints" / "step-000004")
    resumed = train(capsys, text, parts, *settings, "--resume")
    assert resumed.code == 0, resumed.err
    for name in ("adapter_model.safetensors", "checkpoints/step-000004/optimizer.safetensors"):
        ours, theirs = (read_tensors(out / name)[0] for out in (whole, parts))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert (whole / "checkpoints/step-000004/adapter_config.json").exists()

    base, tuned, merged = (GPT2.from_pretrained(path) for path in (model, whole, whole / "merged"))
    assert not torch.equal(base.h[0].attn.c_attn.weight, tuned.h[0].attn.c_attn.weight)
    assert torch.equal(base.wte.weight, tuned.wte.weight)
    assert all(torch.equal(a, b) for a, b in zip(tuned.parameters(), merged.parameters()))
    said = [
        sample(capsys, path, "--prompt", "The", "--seed", 3) for path in (whole, whole / "merged")
    ]
    assert said[0].code == 0 and said[0].out == said[1].out

    shutil.rmtree(whole / "merged")
    again = train(capsys, text, whole, *settings, "--resume")
    assert "nothing to do" in again.err and (whole / "merged" / "model.safetensors").exists()
    refused = train(capsys, text, whole, *settings, "--resume", "--lora-alpha", 64)
    assert "--lora-alpha was 6 in" in refused.last_line

    other = tiny_folder(tmp_path / "other", vocab_size=301)
    shutil.copytree(other, model, dirs_exist_ok=True)
    assert "was trained on" in sample(capsys, whole, "--prompt", "The").last_line


def test_a_changed_setting_is_told_and_the_run_goes_on(capsys, tmp_path, text, model):
    settings = ["--model", model, "--batch-size", 3, "--max-steps", 2]
    assert train(capsys, text, tmp_path / "run", *settings).code == 0
    settings[-1] = 3
    result = train(capsys, text, tmp_path / "run", *settings, "--learning-rate", 0.5, "--resume")
    assert result.code == 0
    assert "--max-steps was 2, from here on it is 3" in result.err
    assert "--learning-rate was 5e-05, from here on it is 0.5" in result.err


def test_a_resumed_run_keeps_its_dropout(capsys, tmp_path, text, model):
    settings = ["--model", model, "--batch-size", 3, "--lora-rank", 2, "--max-steps"]
    assert train(capsys, text, tmp_path / "run", *settings, 2, "--dropout", 0.5).code == 0
    result = train(capsys, text, tmp_path / "run", *settings, 3, "--resume")
    assert result.code == 0 and "--dropout" not in result.err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["dropout"] == 0.5


def test_the_run_folder_says_how_it_was_made(capsys, tmp_path, text, model):
    settings = ["--model", model, "--batch-size", 3, "--max-steps", 2, "--tensorboard"]
    assert train(capsys, text, tmp_path / "run", *settings).code == 0
    assert train(capsys, text, tmp_path / "run", *settings[:5], 3, "--resume").code == 0
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [session["from_step"] for session in info["sessions"]] == [0, 2]
    assert info["sessions"][0]["versions"]["torch"] == torch.__version__
    assert info["data"]["n_train_tokens"] + info["data"]["n_val_tokens"] == info["data"]["n_tokens"]
    assert info["settings"]["max_steps"] == 3
    assert info["memory"]["total"] > 0
    assert any((tmp_path / "run" / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("change", "name"),
    [("data", "--data"), ("seed", "--seed"), ("batch", "--batch-size"), ("model", "--model")],
)
def test_resume_refuses_another_run_and_names_both_values(
    capsys, tmp_path, text, model, change, name
):
    out = tmp_path / "run"
    settings = {"--model": model, "--batch-size": 3, "--max-steps": 1, "--seed": 5}
    flags = [part for pair in settings.items() for part in pair]
    assert train(capsys, text, out, *flags).code == 0
    if change == "data":
        text.write_text(TEXT + "One more line.\n")
    elif change == "model":
        settings["--model"] = tiny_folder(tmp_path / "other")
    else:
        settings[name] = 4
    flags = [part for pair in settings.items() for part in pair]
    result = train(capsys, text, out, *flags, "--resume")
    assert result.code == 2, result.err
    assert re.search(rf"--resume: {name} was \S+ in .* and is \S+ now", result.last_line)


def test_a_preset_starts_from_random_weights_with_its_part_of_the_vocabulary(
    capsys, tmp_path, text
):
    out = tmp_path / "run"
    flags = ["--preset", "nano", "--max-steps", 1, "--batch-size", 2, "--block-size", 16]
    result = train(capsys, text, out, *flags, "--dropout", 0.2)
    assert result.code == 0, result.err
    config = json.loads((out / "config.json").read_text())
    assert (config["vocab_size"], config["n_layer"], config["resid_pdrop"]) == (2048, 4, 0.2)
    assert Tokenizer.from_pretrained(out).vocab_size == 2048


NANO = ["--preset", "nano", "--batch-size", 2, "--block-size", 16]


def test_a_preset_may_have_another_part_of_the_vocabulary(capsys, tmp_path, text):
    out = tmp_path / "run"
    result = train(capsys, text, out, *NANO, "--max-steps", 1, "--vocab-size", 300)
    assert result.code == 0, result.err
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 300
    assert Tokenizer.from_pretrained(out).identity == Tokenizer.gpt2(300).identity
    for other in ("--vocab-size=301", "--train-vocabulary"):
        result = train(capsys, text, out, *NANO, "--max-steps", 2, "--resume", other)
        assert result.code == 2 and other.split("=")[0] in result.last_line, result.err


def vocabulary_of(folder):
    names = ("vocab.json", "merges.txt")
    return [(folder / name).read_bytes() for name in names]


def test_a_run_trains_a_vocabulary_once_and_keeps_it(capsys, tmp_path, text, monkeypatch):
    text.write_text(text_in("hindi") * 9)
    out, flags = tmp_path / "run", [*NANO, "--train-vocabulary", "--vocab-size"]
    result = train(capsys, text, out, *flags, 330, "--max-steps", 2, "--save-every", 1)
    assert result.code == 0, result.err
    assert re.search(
        r"bytes per token +\d\.\d\d of its own .*, 1\.\d\d of GPT-2's; held", result.err
    )
    assert "made for English" not in result.err
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == 330 and config["eos_token_id"] == 329
    tokenizer, first = Tokenizer.from_pretrained(out), vocabulary_of(out)
    line = text_in("hindi", 2)
    assert tokenizer.encode(line) == hf_reads(out).encode(line)
    assert len(tokenizer.encode(line)) < len(Tokenizer.gpt2().encode(line))
    written = sample(capsys, out, "--prompt", "नाव", "--max-new-tokens", 3)
    assert written.code == 0 and written.out.startswith("नाव")

    # a vocabulary that is there needs neither the library nor what the cache has of it
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    resumed = run_here(capsys, "train", "--resume", "--out", out, "--max-steps", 3)
    assert resumed.code == 0, resumed.err
    assert vocabulary_of(out) == first
    for other, told in [
        (["--vocab-size", 331], "--vocab-size was 330 in"),
        (["--no-train-vocabulary"], "--train-vocabulary was True in"),
        (["--model", "gpt2"], "--preset was nano in"),
    ]:
        refused = run_here(capsys, "train", "--resume", "--out", out, *other)
        assert refused.code == 2
        assert told in refused.last_line or other[0] == "--model", refused.err
    new = tmp_path / "new"
    refused = train(capsys, text, new, *flags, 330)
    assert refused.last_line == (
        "error: --train-vocabulary needs tokenizers: pip install tokenizers"
    )
    assert not new.exists()


def test_a_run_that_was_killed_before_its_first_checkpoint_trains_the_same_vocabulary(
    capsys, tmp_path, text
):
    whole, died = tmp_path / "whole", tmp_path / "died"
    flags = [*NANO, "--train-vocabulary", "--vocab-size", 300, "--max-steps", 2]
    assert train(capsys, text, whole, *flags).code == 0
    died.mkdir()
    shutil.copy(whole / "run.json", died)
    shutil.rmtree(tmp_path / "cache")
    result = run_here(capsys, "train", "--resume", "--out", died, "--workers", 2)
    assert result.code == 0 and "starting at step 0" in result.err, result.err
    assert vocabulary_of(died) == vocabulary_of(whole)
    names = ("model.safetensors", "config.json")
    assert all((died / name).read_bytes() == (whole / name).read_bytes() for name in names)


def test_a_vocabulary_is_trained_on_text_from_stdin(capsys, tmp_path, monkeypatch):
    flags = [*NANO, "--train-vocabulary", "--vocab-size", 300, "--max-steps"]
    for more in ([1], [2, "--resume"]):
        give_stdin(monkeypatch, text_in("greek").encode())
        result = train(capsys, "-", tmp_path / "run", *flags, *more)
        assert result.code == 0, result.err


def test_held_out_text_of_ones_own_is_what_the_model_is_judged_by(capsys, tmp_path, text, model):
    (tmp_path / "val.txt").write_text(TEXT[::-1])
    out = tmp_path / "run"
    flags = ["--val-data", tmp_path / "val.txt", "--max-steps", 1, "--batch-size", 2]
    result = train(capsys, text, out, "--model", model, *flags)
    assert result.code == 0, result.err
    assert "val_loss" in (out / "metrics.jsonl").read_text()


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, text, model, number, code):
    out = tmp_path / "run"
    command = [*warm.python(), str(ROOT / "train.py"), "--data", str(text), "--model", str(model)]
    command += ["--out", str(out), "--max-steps", "100000", "--eval-every", "100000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (
        metrics.exists() and '"step": 3,' in metrics.read_text()
    ):
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "stopping after this step; a second one stops without saving" in err
    resumed = [sys.executable, str(ROOT / "train.py"), "--resume", "--out", str(out)]
    assert err.endswith(f"everything is saved, go on with: {shlex.join(resumed)}\n")
    saved = {path.name for path in (out / "checkpoints").iterdir()}
    assert saved == {"step-000000", f"step-{len(metrics.read_text().splitlines()) - 1:06d}"}


# what a shell would take apart, expand or obey, what looks like a flag, and a line end
ODD_NAMES = ["a --resume b.txt", 'it\'s "$HOME" `x`; y.txt', "two\nlines & more.txt", "-dash.txt"]
ODD_OUT = "-o 'x' \"$HOME\"; #\n --resume"


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
def test_the_printed_commands_can_be_pasted_whatever_the_names(tmp_path, model):
    for name in ODD_NAMES:
        (tmp_path / name).write_text(f"{name}: {TEXT}")
    shutil.copytree(model, tmp_path / "my model")
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"  # noqa: PTH120
    place = {"cwd": tmp_path, "env": {**os.environ, "PATH": path}, "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = ["python", str(ROOT / "train.py"), "--model", "my model", f"--out={ODD_OUT}"]
    command += ["--data", *(f"./{name}" for name in ODD_NAMES[:-1]), f"--val-data={ODD_NAMES[-1]}"]
    command += ["--max-steps", "500", "--eval-every", "500", "--batch-size", "2"]
    process = subprocess.Popen(command, **place, **pipes)
    metrics = tmp_path / ODD_OUT / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '"step": 2,' in metrics.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err

    pasted = err.split("everything is saved, go on with: ")[1].rstrip("\n")
    resume = [*command[:2], "--resume", f"--out={ODD_OUT}"]
    assert pasted.startswith(f"python {ROOT}") and words_of(pasted) == resume
    resumed = subprocess.run(["bash", "-c", pasted], capture_output=True, **place)
    assert resumed.returncode == 0, resumed.stderr
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [*range(501)]
    info = json.loads((tmp_path / ODD_OUT / "run.json").read_text())
    typed = [words_of(session["command"]) for session in info["sessions"]]
    assert typed == [command, resume]

    pasted = resumed.stderr.split("\ndone: ")[1]
    sampled = subprocess.run(["bash", "-c", pasted], capture_output=True, **place)
    assert sampled.returncode == 0, sampled.stderr
    assert sampled.stdout.startswith("...")


def resume_words(monkeypatch, argv, local_size, world=3, **flags):
    """How train.py, started by torchrun with these words, says that it can be resumed."""
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", ["/venv/bin/python", "-u", *argv])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_size))
    return train_command.how_to_resume(TrainOptions(("x",), **flags), World(0, world, 0))


def test_under_torchrun_on_one_machine_its_command_is_printed_once_resumed_or_not(monkeypatch):
    argv = ["train.py", "--data", "a --resume b.txt"]
    said = resume_words(monkeypatch, argv, 3)
    command = shlex.split(said.removeprefix("go on with: "))
    assert command[-5:] == ["--nproc-per-node=3", "train.py", "--resume", "--out", "runs/x-gpt2"]
    again = resume_words(monkeypatch, [*argv, "--resume"], 3, resume=True)
    assert again == said
    monkeypatch.setenv("PATH", "")
    assert f"{sys.executable} -m torch.distributed.run --nproc" in resume_words(
        monkeypatch, argv, 3
    )


FORMS = {  # what was typed: sys.orig_argv and sys.argv, and what goes on
    "script": ("python train.py --data x", "train.py --data x", "python train.py"),
    "module": ("python -m minigpt2 train --data x", "/p/minigpt2/__main__.py train --data x",
               "python -m minigpt2 train"),
    "program": ("/v/python /v/minigpt2 train --data x", "/v/minigpt2 train --data x",
                "minigpt2 train"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_printed_commands_take_the_form_that_was_typed(form, monkeypatch):
    typed, argv, again = FORMS[form]
    monkeypatch.setattr(sys, "orig_argv", typed.split())
    monkeypatch.setattr(sys, "argv", argv.split())
    said = train_command.how_to_resume(TrainOptions(("x",), out="run"), World())
    assert said == f"go on with: {again} --resume --out run"
    sample = shlex.join(train_command.sample_command(Path("run")))
    assert sample == f"{again.replace('train', 'sample')} --model run"


def test_under_torchrun_the_module_is_started_again_as_one(monkeypatch):
    said = resume_words(monkeypatch, ["/p/minigpt2/__main__.py", "train", "--data", "x"], 3)
    assert " -m minigpt2 train --resume" in said and "__main__" not in said


def test_text_from_stdin_has_to_come_again(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "-"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", "--data", "-"])
    options = TrainOptions(("-",), out="run")
    said = train_command.how_to_resume(options, World())
    assert said == "go on with the same text on stdin and: python train.py --resume --out run"


def test_on_several_machines_nobody_is_told_to_start_all_processes_on_one(monkeypatch):
    said = resume_words(monkeypatch, ["train.py", "--data", "x"], 8, world=32)
    assert said == "go on with the same command on every machine, with --resume"


def test_the_same_seed_writes_the_same_text(capsys, model):
    first, second, other = (
        sample(capsys, model, "--prompt", "The", "--seed", seed).out for seed in (1, 1, 2)
    )
    assert first == second != other


def test_sample_k_is_the_same_for_any_number_of_samples(capsys, model):
    def texts(n):
        flags = ["--prompt", "The", "--num-samples", n, "--json", "--max-new-tokens", 12]
        return [json.loads(line)["ids"] for line in sample(capsys, model, *flags).out.splitlines()]

    four = texts(4)
    assert len({tuple(ids) for ids in four}) > 1
    assert texts(1) == four[:1] and texts(3) == four[:3]


def test_json_lines_hold_text_ids_and_the_reason(capsys, model):
    result = sample(capsys, model, "--prompt", "The", "--json", "--max-new-tokens", 5)
    row = json.loads(result.out)
    assert row["prompt"] == "The" and len(row["ids"]) == 5 and row["finish_reason"] == "length"
    assert row["text"] == Tokenizer.from_pretrained(model).decode(row["ids"])


def test_no_new_tokens_writes_the_prompt_alone(capsys, model):
    assert sample(capsys, model, "--prompt", "The lamp", "--max-new-tokens", 0).out == "The lamp\n"


def test_an_empty_prompt_starts_a_document(capsys, model):
    assert sample(capsys, model, "--prompt", "", "--max-new-tokens", 3).code == 0


def test_a_prompt_longer_than_the_window_is_cut_with_a_notice_and_text_goes_on_past_it(
    capsys, model
):
    result = sample(capsys, model, "--prompt", "x" * 200, "--max-new-tokens", 60)
    assert result.code == 0
    assert len(re.findall(r"the prompt has \d+ tokens, the model reads 23", result.err)) == 1


def test_prompts_come_from_stdin_and_files(tmp_path, model):
    (tmp_path / "prompt.txt").write_text("\ufeffThe sea", encoding="utf-8")
    more = ["--model", model, "--max-new-tokens", 0]
    assert run_alone("sample", "--prompt", "-", *more, stdin=b"A lamp").out == "A lamp\n"
    assert run_alone("sample", "--prompt", "-", *more).out == "\n"
    assert run_alone("sample", "--prompt-file", tmp_path / "prompt.txt", *more).out == "The sea\n"


def test_text_beyond_the_outputs_encoding_is_escaped(model):
    more = ["--model", model, "--max-new-tokens", 0]
    result = run_alone("sample", "--prompt", "\u2603", *more, PYTHONIOENCODING="ascii")
    assert (result.code, result.out) == (0, "\\u2603\n")


def test_a_reader_who_leaves_is_no_error(model):
    command = f"{sys.executable} sample.py --model {model} --prompt x --max-new-tokens 500"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -c 1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 141)
    assert "Traceback" not in done.stderr and "Error" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_keeps_what_was_written_and_ends_the_line(model):
    command = [*warm.python(), str(ROOT / "sample.py"), "--model", str(model), "--prompt", "The"]
    command += ["--max-new-tokens", "10000000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    start = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert start.startswith(b"The") and rest.endswith(b"\n")
    assert b"Traceback" not in err


def test_interactive_answers_until_the_input_ends(model):
    lines = b"The lamp\nThe sea\n"
    result = run_alone(
        "sample", "--interactive", "--model", model, "--max-new-tokens", 3, stdin=lines
    )
    assert result.code == 0
    assert "The lamp" in result.out and "The sea" in result.out


def test_special_tokens_go_through_a_run_and_what_is_sampled_from_it(
    tmp_path, tmp_path_factory, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    roles = {"bos_token": "<s>", "pad_token": "<pad>", "model_max_length": 64}
    words = [word("<s>"), word("<user>"), word("lamp", special=False), word("<pad>")]
    preferring([65], 303).save_pretrained("base")  # no row for the last word
    with_words(tmp_path / "base", tmp_path_factory, *words, **roles, chat_template="{{ x }}")
    Path("text.txt").write_text("<user>a lamp<s>" * 60)
    flags = ["--data", "text.txt", "--model", "base", "--max-steps", 1, "--batch-size", 2]
    flags += ["--block-size", 8, "--device", "cpu", "--lora-rank", 2, "--merge-lora"]
    plain = run_here(capsys, "train", *flags, "--out", "plain")
    said = " ".join(plain.err.split())
    assert plain.code == 0 and "read as plain text: <s> (60), <user> (60); --special-tok" in said
    result = run_here(capsys, "train", *flags, "--out", "run", "--special-tokens")
    assert result.code == 0 and "read as plain text" not in result.err
    assert json.loads(Path("run/run.json").read_text())["options"]["--special-tokens"] is True
    for folder in ("run", "run/merged"):
        tokenizer = hf_reads(Path(folder))
        for role, value in roles.items():
            assert getattr(tokenizer, role) == value
        assert tokenizer.chat_template == "{{ x }}"
    merged = json.loads(Path("run/merged/config.json").read_text())
    assert (merged["bos_token_id"], merged["eos_token_id"]) == (300, 299)
    # sampling follows the run, and says so
    ask = ["--prompt", "<user>a", "--max-new-tokens", 1, "--device", "cpu"]
    for folder in ("run", "run/merged"):
        result = run_here(capsys, "sample", "--model", folder, *ask)
        assert result.code == 0 and f"{folder} was trained with --special-tokens" in result.err
        assert "plain text: --special-tokens" not in result.err
        result = run_here(capsys, "sample", "--model", folder, *ask, "--no-special-tokens")
        assert "<user> in a text is read as plain text: --special-tokens" in result.err
    # and a run that goes on reads its text as it did
    result = run_here(capsys, "train", "--resume", "--out", "run", "--max-steps", 2)
    assert result.code == 0, result.err
    for out, flag in (("run", "--no-special-tokens"), ("plain", "--special-tokens")):
        result = run_here(capsys, "train", "--resume", "--out", out, "--max-steps", 3, flag)
        assert result.code == 2 and "--special-tokens was" in result.last_line
    # a word without a row is no trouble until a text has it
    Path("text.txt").write_text("<pad>a lamp" * 60)
    result = run_here(capsys, "train", *flags, "--out", "other", "--special-tokens")
    assert result.code == 2, result.err
    assert "has the token '<pad>', id 303, for which the model has no row" in result.last_line


def test_a_flag_for_special_tokens_that_are_in_no_prompt_is_said(model, capsys):
    ask = ["--model", model, "--prompt", "a", "--max-new-tokens", 1, "--special-tokens"]
    result = run_here(capsys, "sample", *ask)
    assert "--special-tokens changes nothing: no special token is in a prompt" in result.err
