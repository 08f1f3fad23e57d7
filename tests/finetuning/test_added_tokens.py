"""Added words are tokens of the run: rows that begin as the mean, are learned, kept and opened."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from minigpt2 import GPT2, InputError, Run, Tokenizer, finetune
from minigpt2.finetuning.added_tokens import grown
from minigpt2.formats.tensors import read_tensors
from scripts import run_here, tiny_folder
from vocabularies import hf_reads

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
WORDS = ("lighthouse", "<user>")
TEXT = "<user>a lighthouse on the sea, <user>and the lighthouse keeper.\n" * 30
FLAGS = ["--data", "text.txt", "--model", "base", "--batch-size", 2, "--block-size", 16]
FLAGS += ["--max-steps", 2, "--save-every", 1, "--learning-rate", 0.05, "--device", "cpu"]
LORA = ["--lora-rank", 2, "--merge-lora"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "cache"))
    tiny_folder(tmp_path / "base")
    Path("text.txt").write_text(TEXT)
    return tmp_path


def untied(model):
    """The same model with a head of its own."""
    other = GPT2(replace(model.config, tie_word_embeddings=False)).eval()
    other.load_state_dict({**model.state_dict(), "lm_head.weight": model.wte.weight.flip(0)})
    return other


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("n_rows", [299, 300, 301, 320])
def test_rows_of_words_begin_as_the_mean_of_those_that_tokens_have(tmp_path, n_rows, tied):
    model = GPT2.from_pretrained(tiny_folder(tmp_path / "model", vocab_size=n_rows))
    model = model if tied else untied(model)
    tokenizer = Tokenizer.gpt2(299)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    larger, known = grown(model, tokenizer, WORDS)
    assert known.encode("<user>a lighthouse") == [300, *tokenizer.encode("a "), 299]
    assert larger.config.vocab_size == max(301, n_rows) == len(larger.wte.weight)
    for name, value in larger.state_dict().items():
        if name not in ("wte.weight", "lm_head.weight"):
            assert torch.equal(value, before[name])
            continue
        assert torch.equal(value[:299], before[name][:299])
        mean = before[name][:299].mean(0)
        torch.testing.assert_close(value[299:], mean.expand(len(value) - 299, -1))
    assert torch.equal(model.wte.weight, before["wte.weight"])  # a copy has grown
    idx = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(larger(idx)[..., :299], model(idx)[..., :299])


def test_a_token_that_has_no_row_gets_one(tmp_path):
    model = GPT2.from_pretrained(tiny_folder(tmp_path / "model", vocab_size=299))
    larger, tokenizer = grown(model, Tokenizer.gpt2(300), ["<|endoftext|>"])
    assert tokenizer.identity == Tokenizer.gpt2(300).identity
    assert larger.config.vocab_size == 300 and not larger.wte.weight.isnan().any()


@pytest.mark.parametrize("word", ["he", "<|endoftext|>", "", "Ġthe", "lighthouse"])
def test_what_is_a_token_already_is_not_added(word):
    tokenizer = Tokenizer.gpt2(1000).with_words(["lighthouse"])
    with pytest.raises(InputError, match="cannot be added: it is a token already, or empty"):
        tokenizer.with_words([word])


@pytest.mark.parametrize("lora", [[], LORA], ids=["full", "lora"])
def test_added_tokens_are_learned_resumed_sampled_and_opened_by_others(place, capsys, lora):
    argv = ["train", *FLAGS, *lora, "--add-tokens", *WORDS, "--out", "run"]
    result = run_here(capsys, *argv)
    assert result.code == 0, result.err
    run, tokenizer = Path("run"), Tokenizer.from_folder(Path("run"))
    assert tokenizer.encode("<user>lighthouse") == [301, 300]
    assert hf_reads(Path("run/base")).encode("<user>lighthouse") == [301, 300]
    begun = GPT2.from_pretrained("run/base").wte.weight
    learned = GPT2.from_pretrained("run").wte.weight
    changed = (begun != learned).any(dim=1)
    assert changed[300:].all() and changed[:300].any() == (not lora)
    # an ended run is one that was stopped and resumed
    once = {path: read_tensors(path)[0] for path in run.glob("*.safetensors")}
    argv[argv.index("--max-steps") + 1] = 1
    assert run_here(capsys, *argv[:-1], "two").code == 0
    result = run_here(capsys, "train", "--resume", "--out", "two", "--max-steps", 2)
    assert result.code == 0, result.err
    for path, tensors in once.items():
        again = read_tensors(Path("two", path.name))[0]
        assert tensors.keys() == again.keys()
        assert all(torch.equal(tensors[name], again[name]) for name in tensors), path
    result = run_here(capsys, "train", "--resume", "--out", "two", "--add-tokens", "other")
    assert result.code == 2 and "--add-tokens was" in result.last_line
    # transformers and peft open it, and compute the same
    idx = torch.tensor([tokenizer.encode("<user>a lighthouse")])
    expected = GPT2.from_pretrained("run").double()(idx)
    theirs = AutoModelForCausalLM.from_pretrained("run/base" if lora else "run")
    if lora:
        theirs = PeftModel.from_pretrained(theirs, "run")
        merged = AutoModelForCausalLM.from_pretrained("run/merged").double()
        torch.testing.assert_close(merged(idx).logits, expected, atol=1e-5, rtol=1e-5)
        assert hf_reads(Path("run/merged")).encode("<user>lighthouse") == [301, 300]
    with torch.no_grad():
        found = theirs.double().eval()(idx).logits
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    ask = ["--model", "run", "--prompt", "a lighthouse", "--max-new-tokens", 3, "--json"]
    result = run_here(capsys, "sample", *ask)
    assert result.code == 0 and len(json.loads(result.out)["ids"]) <= 3


@pytest.mark.parametrize("in_memory", [False, True])
def test_finetune_adds_tokens_too(place, in_memory):
    model, tokenizer = GPT2.from_pretrained("base"), Tokenizer.from_pretrained("base")
    before = model.wte.weight.clone()
    run = finetune(
        *((model, tokenizer) if in_memory else ("base",)),
        texts=[TEXT],
        out="run",
        add_tokens=WORDS,
        special_tokens=True,
        max_steps=1,
        batch_size=1,
        block_size=16,
        device="cpu",
        progress=False,
    )
    assert run.tokenizer.encode("<user>lighthouse") == [301, 300]
    assert len(run.model.wte.weight) == 302 and torch.equal(model.wte.weight, before)
    again = Run.open("run").resume(max_steps=2, progress=False)
    assert again.metrics[-1].step == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--add-tokens", "a", "a"], "--add-tokens holds an empty text, or one twice"),
        (["--add-tokens", "!"], "'!' cannot be added: it is a token already"),
        (["--preset", "nano", "--add-tokens", "ab"], "--preset begins one: choose one"),
    ],
)
def test_words_that_cannot_be_added_are_refused_in_one_line(place, capsys, flags, message):
    model = [] if "--preset" in flags else ["--model", "base"]
    result = run_here(capsys, "train", "--data", "text.txt", *model, *flags, "--out", "run")
    assert result.code == 2 and message in result.last_line and result.err.count("\n") == 1
    assert not Path("run").exists()


def test_under_lora_a_head_of_its_own_is_refused(place, capsys):
    untied(GPT2.from_pretrained("base")).save_pretrained("own", Tokenizer.from_pretrained("base"))
    argv = ["--data", "text.txt", "--model", "own", "--lora-rank", 2, "--add-tokens", "lamp!"]
    result = run_here(capsys, "train", *argv, "--out", "run")
    assert result.code == 2 and "this model's is its own; train all weights" in result.last_line
