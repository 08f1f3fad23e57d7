"""Chats from a file to a run, and from the run to a conversation."""

import json
import re
from itertools import count

import pytest
from transformers import AutoTokenizer

from minigpt2.decoding.text import complete, stream_text
from minigpt2.formats.chat import TEMPLATE
from minigpt2.model import GPT2
from minigpt2.sampling import SamplingConfig
from minigpt2.tokenizer import Tokenizer
from scripts import run_here, tiny_folder

HOW = {"max_new_tokens": 9, "seed": 1337, "sampling": SamplingConfig(temperature=0.8, top_p=0.95)}
OTHER = TEMPLATE.replace(r"eos_token if message['role'] == 'assistant' else ", "")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny", n_positions=199)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "cache"))


def chats(path, n_turns):
    rows = [
        [
            {"role": role, "content": f"{role} {n} {turn}"}
            for turn in range(n_turns)
            for role in ("user", "assistant")
        ]
        for n in range(40)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


def typed(monkeypatch, *questions):
    """Let these be typed at the prompt."""
    said = iter(questions)

    def ask():
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("minigpt2.cli.prompts._line", ask)


def trained(capsys, tmp_path, model, *more, n_turns=2):
    data = chats(tmp_path / "chats.jsonl", n_turns)
    argv = ["--data", data, "--model", model, "--out", tmp_path / "run", "--max-steps", 2]
    return run_here(capsys, "train", *argv, "--batch-size", 2, *more)


def test_a_run_on_chats_keeps_the_template_and_says_how_to_talk_to_it(
    capsys, tmp_path, model, monkeypatch
):
    result = trained(capsys, tmp_path, model, "--mask-prompt")
    assert result.code == 0, result.err
    assert "chats                     40" in result.err
    assert "chats of several answers  40" in result.err
    assert result.last_line.endswith("--interactive")
    messages = [{"role": "user", "content": "Hi <|im_end|>"}, {"role": "assistant", "content": "!"}]
    run = tmp_path / "run"
    for folder in (run, *(run / "checkpoints").iterdir()):
        theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.from_folder(folder)
        assert ours.has_chat_template
        expected = theirs.apply_chat_template(messages, tokenize=False)
        assert ours.chat.render(messages) == expected
    card = (run / "README.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    shorter = code.replace("max_new_tokens=100", "max_new_tokens=2")
    monkeypatch.chdir(run)
    exec(shorter, {})
    assert "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n" in capsys.readouterr().out
    assert "--interactive" in card
    again = run_here(capsys, "train", "--resume", "--out", run, "--max-steps", 3)
    assert again.code == 0, again.err


def test_a_conversation_goes_on_with_what_was_said(capsys, tmp_path, model, monkeypatch):
    tokenizer = Tokenizer.from_folder(model).with_chat_template()
    gpt2 = GPT2.from_pretrained(model)
    gpt2.save_pretrained(tmp_path / "chat", tokenizer)
    questions = ["Where?", "<|endoftext|>", "When?"]
    typed(monkeypatch, *questions)
    result = run_here(
        capsys, "sample", "--model", tmp_path / "chat", "--interactive", "--max-new-tokens", 9
    )
    assert result.code == 0, result.err
    said, expected = [], ""
    for row, question in zip(count(), questions):
        said.append({"role": "user", "content": question})
        ids = tokenizer.encode_chat(said)
        answer = "".join(stream_text(gpt2, tokenizer, ids, row=row, **HOW))
        said.append({"role": "assistant", "content": answer})
        expected += answer + "\n"
    assert result.out == expected + "\n"
    assert "trained on chats: what is asked is remembered" in result.err


def test_an_answer_by_another_template_ends_where_that_ends_it(
    capsys, tmp_path, model, monkeypatch
):
    tokenizer = Tokenizer.from_folder(model)
    tokenizer.save(tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text(OTHER)
    gpt2 = GPT2.from_pretrained(model)
    gpt2.save_pretrained(tmp_path / "chat", Tokenizer.from_folder(tmp_path / "chat"))
    seen = []

    def ended(*given, stop=(), **how):
        seen.append(stop)
        yield from ["said", " so"]

    monkeypatch.setattr("minigpt2.decoding.text.stream_text", ended)
    typed(monkeypatch, "Where?")
    flags = ["--interactive", "--stop", "x"]
    result = run_here(capsys, "sample", "--model", tmp_path / "chat", *flags)
    assert (result.code, result.out) == (0, "said so\n\n")
    assert seen == [["x", "<|im_end|>"]]


def test_document_mask_is_refused_where_it_would_tear_chats_apart(capsys, tmp_path, model):
    result = trained(capsys, tmp_path, model, "--document-mask")
    assert result.code == 2
    assert "--document-mask hides what is before an end-of-text" in result.last_line
    assert "in 40 chats the later answers would not see the earlier" in result.last_line
    assert not (tmp_path / "run").exists()
    whole = trained(capsys, tmp_path, model, "--document-mask", "--mask-prompt", n_turns=1)
    assert whole.code == 0, whole.err


def test_special_tokens_change_nothing_in_a_chat_and_that_is_said(
    capsys, tmp_path, model, monkeypatch
):
    tokenizer = Tokenizer.from_folder(model).with_chat_template()
    GPT2.from_pretrained(model).save_pretrained(tmp_path / "chat", tokenizer)
    typed(monkeypatch)
    flags = ["--interactive", "--special-tokens"]
    result = run_here(capsys, "sample", "--model", tmp_path / "chat", *flags)
    assert "--special-tokens changes nothing: in a chat what is asked is plain text" in result.err


def test_ids_are_a_prompt_too(model):
    gpt2, tokenizer = GPT2.from_pretrained(model), Tokenizer.from_folder(model)
    ids = tokenizer.encode("The lamp")
    text = "".join(stream_text(gpt2, tokenizer, ids, **HOW))
    assert text == complete(gpt2, tokenizer, "The lamp", **HOW)[0].text
