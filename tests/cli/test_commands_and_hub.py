"""The commands ask the Hub once for a model and its tokenizer, and for weights after the text."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import hub_fixtures
from hub_server import HubServer
from minigpt2.cli import corpus as corpus_command
from minigpt2.cli.console import run_script
from minigpt2.corpus.options import CorpusOptions
from minigpt2.decoding.ready import load_with_tokenizer
from minigpt2.errors import InputError
from minigpt2.hub import patience
from minigpt2.hub.folders import require_source
from minigpt2.lora import add_lora, save_adapter
from minigpt2.model import GPT2
from minigpt2.tokenizer import Tokenizer
from minigpt2.training import build
from minigpt2.training.options import TrainOptions
from scripts import Result, run_here, tiny_folder
from text_files import lamp_lines

cache, serve = hub_fixtures.cache, hub_fixtures.serve
REPO, OTHER = "ada/tiny", "ada/other"
WEIGHTS = "model.safetensors"
TEXT = "".join(lamp_lines(60))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "tokens"))


@pytest.fixture
def folder(tmp_path):
    return tiny_folder(tmp_path / "model")


@pytest.fixture
def pushed(tmp_path):
    """The same model with other weights and other tokens."""
    tiny_folder(tmp_path / "pushed", vocab_size=280)
    return tmp_path / "pushed"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "lamps.txt"
    path.write_text(TEXT)
    return path


def corpus(capsys, *argv: object) -> Result:
    """Run `python -m minigpt2.corpus` in this process."""
    capsys.readouterr()
    given = [str(argument) for argument in argv]
    code = run_script(corpus_command.main, CorpusOptions, given, positional=True)
    return Result(code, *capsys.readouterr())


def train(capsys, out, *more):
    steps = () if "--max-steps" in more else ("--max-steps", 1)
    short = (*steps, "--batch-size", 2, "--device", "cpu", "--workers", 1)
    return run_here(capsys, "train", "--model", REPO, "--out", out, *short, *more)


def sample(capsys, *more):
    short = ("--max-new-tokens", 9, "--device", "cpu")
    return run_here(capsys, "sample", "--prompt", "The", *short, *more)


LOCAL = {  # what is typed, and what the line says of it
    "runs/frist": "there is no folder runs/frist (did you mean 'runs/first'?); the Hub is not",
    "./runs/frist": "there is no folder './runs/frist' (did you mean 'runs/first'?), nor",
    "rnus/first/": "there is no folder 'rnus/first/' (did you mean 'runs/first'?), nor",
    "../nobody/here": "there is no folder '../nobody/here', nor is it a Hub id",
    "~/runs/frist": "there is no folder '~/runs/frist'",
    "a/b/c": "there is no folder 'a/b/c'",
    "runs/first/config.json": "is a file, expected a model folder",
}


@pytest.mark.parametrize(("typed", "said"), LOCAL.items())
@pytest.mark.parametrize("command", ["sample", "draft", "train", "convert", "corpus", "library"])
def test_a_local_folder_that_is_missing_is_said_without_asking_the_hub(
    serve, folder, text, capsys, monkeypatch, typed, said, command
):
    server = serve({"runs/frist": folder})
    monkeypatch.chdir(text.parent)
    shutil.copytree(folder, "runs/first")
    if command == "library":
        with pytest.raises(InputError) as refusal:
            GPT2.from_pretrained(typed)
        assert said in str(refusal.value)
    else:
        result = {
            "sample": lambda: sample(capsys, "--model", typed),
            "draft": lambda: sample(capsys, "--model", folder, "--draft", typed),
            "train": lambda: run_here(capsys, "train", "--model", typed, "--data", text),
            "convert": lambda: run_here(capsys, "convert_weights", typed, "new"),
            "corpus": lambda: corpus(capsys, text, "--model", typed),
        }[command]()
        assert result.code == 2 and said in result.err and result.err.count("\n") == 1
    assert server.requests == []


def test_a_hub_id_beside_a_folder_of_its_owner_serves_when_it_was_downloaded(
    serve, folder, capsys, monkeypatch, tmp_path
):
    serve({REPO: folder})
    monkeypatch.chdir(tmp_path)
    assert sample(capsys, "--model", REPO).code == 0
    (tmp_path / "ada").mkdir()
    assert sample(capsys, "--model", REPO).code == 0
    require_source("openai-community/gpt2")  # known by its pin


@pytest.mark.parametrize("name", ["mymodle", "adda/modle"])
def test_a_name_that_the_hub_has_not_either_is_told_with_the_nearest_folders(
    serve, folder, capsys, monkeypatch, tmp_path, name
):
    server = serve({REPO: folder})
    for near in ("mymodel", "ada/model"):
        shutil.copytree(folder, tmp_path / "here" / near)
    monkeypatch.chdir(tmp_path / "here")
    result = sample(capsys, "--model", name)
    meant = "'mymodel'" if name == "mymodle" else "'ada/model'"
    assert f"there is no folder {name} (did you mean {meant}?) and no model" in result.err
    assert server.requests
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: None)
    hub_fixtures.use_endpoint(monkeypatch, "http://127.0.0.1:9")  # where nobody listens
    result = sample(capsys, "--model", name)
    assert f"nor a folder here (did you mean {meant}?)" in result.last_line


def asked(server: HubServer, *parts: str) -> int:
    """How many requests have all these in their path."""
    return sum(all(part in request.path for part in parts) for request in server.requests)


# Once


def test_sampling_takes_weights_and_tokens_of_one_commit(serve, folder, pushed, capsys):
    server = serve({REPO: folder})
    server.push_after("GET", WEIGHTS, REPO, pushed)
    found = sample(capsys, "--model", REPO)
    assert found == sample(capsys, "--model", folder) and found.code == 0
    assert asked(server, "/main/") == 1
    assert sample(capsys, "--model", REPO).out == sample(capsys, "--model", pushed).out


def test_a_drafter_is_asked_for_once_too_and_may_be_of_one_commit_only(
    serve, folder, pushed, capsys
):
    server = serve({REPO: folder, OTHER: folder})
    server.push_after("GET", "vocab.json", OTHER, pushed)
    server.push("ada/other", folder)
    guessed = sample(capsys, "--model", folder, "--draft", OTHER, "--temperature", 0)
    assert (
        guessed.code == 0
        and guessed.out == sample(capsys, "--model", folder, "--temperature", 0).out
    )
    assert asked(server, OTHER, "/main/") == 1
    refused = sample(capsys, "--model", folder, "--draft", OTHER)
    assert "has other tokens than --model" in refused.err


def test_a_drafter_with_other_tokens_is_refused_before_its_weights_are_downloaded(
    serve, folder, pushed, capsys
):
    server = serve({OTHER: pushed})
    refused = sample(capsys, "--model", folder, "--draft", OTHER)
    assert refused.code == 2 and f"--draft {OTHER} has other tokens" in refused.err
    assert asked(server, WEIGHTS) == 0 < asked(server, "vocab.json")


def test_model_and_tokenizer_are_asked_for_once_by_the_library_too(serve, folder, pushed):
    server = serve({REPO: folder})
    server.push_after("GET", WEIGHTS, REPO, pushed)
    model, tokenizer = load_with_tokenizer(REPO, device="cpu")
    assert model.config.vocab_size == tokenizer.vocab_size == 300
    assert asked(server, "/main/") == 1


@pytest.mark.parametrize("moment", [("GET", "vocab.json"), ("HEAD", WEIGHTS)])
@pytest.mark.parametrize("more", [(), ("--lora-rank", 2)], ids=["all weights", "LoRA"])
def test_training_takes_weights_and_tokens_of_one_commit(
    serve, folder, pushed, text, tmp_path, capsys, moment, more
):
    server = serve({REPO: folder})
    first = server.commits[REPO]
    server.push_after(*moment, REPO, pushed)
    result = train(capsys, tmp_path / "run", "--data", text, *more)
    assert result.code == 0, result.err
    assert asked(server, "/main/") == 1
    assert asked(server, WEIGHTS) == asked(server, WEIGHTS, f"/{first}/") > 0
    assert Tokenizer.from_folder(tmp_path / "run").identity == Tokenizer.gpt2(300).identity


def test_every_process_takes_the_commit_of_the_first(serve, folder, pushed):
    server = serve({REPO: folder})
    first = server.commits[REPO]
    server.push(REPO, pushed)
    options = TrainOptions(data=("x",), model=REPO)
    world = SimpleNamespace(gather=lambda value: [first, value])
    assert build.find_base(options, None, world).name == first
    local = replace(options, model=str(folder))
    world = SimpleNamespace(gather=lambda value: [value, value])
    assert build.find_base(local, None, world) == folder


# The text first


def test_text_that_is_not_there_is_said_before_anything_is_asked(serve, folder, text, capsys):
    server = serve({REPO: folder})
    for data in (("typo.txt",), ("none-*.txt",), ("hf://datasets/ada/books", "typo.txt")):
        for result in (
            train(capsys, text.parent / "run", "--data", *data),
            train(capsys, text.parent / "run", "--data", text, "--val-data", *data),
            corpus(capsys, *data, "--model", REPO),
            corpus(capsys, text, "--val-data", *data, "--model", REPO),
        ):
            assert result.code == 2 and "does not exist and matches no file" in result.err
    prompts = sample(capsys, "--model", REPO, "--prompts-file", "typo.txt")
    assert prompts.code == 2
    assert server.requests == []


@pytest.mark.parametrize(
    ("content", "more", "problem"),
    [
        (b"", (), "there is no text"),
        (TEXT.encode(), ("--block-size", 24), "--block-size is 24, the model has 23"),
        (TEXT.encode(), ("--patience", 2, "--val-fraction", 0), "--patience needs held-out text"),
    ],
)
@pytest.mark.parametrize("lora", [(), ("--lora-rank", 2)], ids=["all weights", "LoRA"])
def test_what_cannot_be_trained_on_is_said_before_weights_are_asked_for(
    serve, folder, text, capsys, content, more, problem, lora
):
    server = serve({REPO: folder})
    text.write_bytes(content)
    result = train(capsys, text.parent / "run", "--data", text, *more, *lora)
    assert result.code == 2 and problem in result.err, result.err
    assert asked(server, WEIGHTS) == 0 < asked(server, "config.json")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.txt", b"%PDF-1.7", "is a PDF"),
        ("a.txt", bytes(range(256)) * 9, "is a binary file"),
        ("a.txt.gz", b"no gzip", "is no whole gzip file"),
        ("a.jsonl", b'{"body": "x"}', "has no field 'text'"),
    ],
)
def test_what_is_no_text_is_said_before_anything_is_asked(
    serve, folder, tmp_path, capsys, name, content, problem
):
    server = serve({REPO: folder})
    (tmp_path / name).write_bytes(content)
    for result in (
        train(capsys, tmp_path / "run", "--data", tmp_path / name),
        corpus(capsys, tmp_path / name, "--model", REPO),
    ):
        assert result.code == 2 and problem in result.err
    assert server.requests == []


def test_the_base_of_an_adapter_is_not_downloaded_for_its_shape(serve, folder, text, capsys):
    model = GPT2.from_pretrained(folder)
    add_lora(model, rank=2, alpha=4)
    adapter = text.parent / "adapter"
    save_adapter(model, adapter, base_model=REPO)
    Tokenizer.gpt2(300).save(adapter)
    server = serve({REPO: folder})
    result = run_here(capsys, "train", "--model", adapter, "--data", text,
                      "--out", text.parent / "run", "--block-size", 24)  # fmt: skip
    assert result.code == 2 and "the model has 23" in result.err
    assert asked(server, WEIGHTS) == 0 < asked(server, "config.json")


def test_preparing_text_downloads_no_weights(serve, folder, text, capsys):
    server = serve({REPO: folder})
    result = corpus(capsys, text, "--model", REPO, "--workers", 1)
    assert result.code == 0 and "tokens" in result.out
    assert asked(server, WEIGHTS) == asked(server, "pytorch_model") == 0


def test_a_run_goes_on_without_the_weights_that_it_began_with(
    serve, folder, text, tmp_path, capsys, cache
):
    server = serve({REPO: folder})
    assert train(capsys, tmp_path / "run", "--data", text).code == 0
    shutil.rmtree(cache)
    before = asked(server, WEIGHTS)
    result = train(capsys, tmp_path / "run", "--data", text, "--resume", "--max-steps", 2)
    assert result.code == 0, result.err
    assert asked(server, WEIGHTS) == before > 0


def test_weights_of_a_folder_that_do_not_fit_are_said_before_the_text_is_read(folder, text, capsys):
    (folder / WEIGHTS).unlink()
    result = run_here(capsys, "train", "--model", folder, "--data", text, "--out",
                      text.parent / "run")  # fmt: skip
    assert result.code == 2 and "holds no model.safetensors" in result.err
    assert not (text.parent / "tokens").exists()


def test_a_tokenizer_that_changed_while_the_text_was_read_is_noticed(folder, pushed):
    tokenizer = Tokenizer.from_pretrained(pushed)
    with pytest.raises(InputError, match="got another tokenizer while the text was read"):
        build.pretrained(str(folder), folder, tokenizer)


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "nano"},
        {"dropout": 0.3},
        {"lora_rank": 2},
        {"lora_rank": 3, "lora_alpha": 5.0, "dropout": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("local", [True, False])
def test_the_outline_is_the_model_without_its_values(serve, folder, options, local):
    serve({REPO: folder})
    source = {} if "preset" in options else {"model": str(folder) if local else REPO}
    options = TrainOptions(data=("x",), **source, **options)
    base = build.find_base(options, None, SimpleNamespace(gather=lambda value: [value]))
    origin = build.Origin(options, None, base)
    tokenizer = build.tokenizer_of(origin)
    torch.manual_seed(1)
    outline = build.without_weights(origin)
    after = torch.initial_seed(), torch.rand(1)
    model = build.first_model(origin, tokenizer)
    described = [
        [(name, p.shape, p.requires_grad) for name, p in part.named_parameters()]
        for part in (outline, model)
    ]
    assert described[0] == described[1] and outline.config == model.config
    torch.manual_seed(1)
    assert after == (1, torch.rand(1)), "no random number was drawn"
