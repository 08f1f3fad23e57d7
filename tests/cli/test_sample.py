"""What sample.py writes: many prompts, JSON, endings, guesses, and a person at the prompt."""

import io
import itertools
import json
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch

from minigpt2.cli import sample as sample_command
from minigpt2.corpus.options import TextConfig
from minigpt2.decoding import text as text_module
from minigpt2.decoding.banned import BannedTexts
from minigpt2.decoding.options import SampleOptions
from minigpt2.decoding.text import complete
from minigpt2.errors import InputError
from minigpt2.model import GPT2
from minigpt2.sampling import SamplingConfig
from minigpt2.tokenizer import Tokenizer
from scripts import ROOT, run_here, tiny_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny", n_positions=61)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "cache"))


def sample(capsys, model, *more):
    return run_here(capsys, "sample", "--model", model, *more)


def rows(result):
    assert result.code == 0, result.err
    return [json.loads(line) for line in result.out.splitlines()]


def test_json_holds_the_models_own_log_probabilities(capsys, model):
    flags = ["--prompt", "The", "--json", "--max-new-tokens", 12, "--top-k", 40]
    (row,) = rows(sample(capsys, model, *flags))
    fields = ["prompt", "sample", "text", "ids", "tokens", "logprobs", "finish_reason"]
    assert list(row) == fields
    tokenizer = Tokenizer.from_pretrained(model)
    text = tokenizer.encode("The") + row["ids"]
    with torch.no_grad():
        expected = GPT2.from_pretrained(model)(torch.tensor([text[:-1]]))[0].log_softmax(-1)
    start = len(text) - len(row["ids"])
    for p, (token, logprob) in enumerate(zip(row["ids"], row["logprobs"]), start=start - 1):
        assert logprob == pytest.approx(float(expected[p, token]), abs=1e-4)


@pytest.mark.parametrize(
    "flags",
    [
        ["--prompt", "The The", "--temperature", 0],
        ["--prompt", "The The", "--num-samples", 3],
        ["--prompt", "The The", "--guess", 4, "--temperature", 1.5],
        ["--prompt", "The The", "--draft", "MODEL", "--ban", "e", "--repetition-penalty", 1.3],
        ["--prompts-file", "PROMPTS", "--num-samples", 2],
        ["--prompt", "The The", "--dtype", "int8"],
    ],
    ids=lambda flags: " ".join(map(str, flags[2:])),
)
def test_top_logprobs_adds_the_likeliest_tokens_to_every_row_and_changes_nothing_else(
    capsys, model, tmp_path, flags
):
    (tmp_path / "prompts").write_text("The sea\nA lamp and a wall\n")
    names = {"MODEL": model, "PROMPTS": tmp_path / "prompts"}
    flags = [*(names.get(word, word) for word in flags), "--json", "--max-new-tokens", 9]
    plain, found = (
        rows(sample(capsys, model, *flags, *more)) for more in ([], ["--top-logprobs", 4])
    )
    tokenizer = Tokenizer.from_pretrained(model)
    for row in found:
        assert list(row)[-2:] == ["top_logprobs", "finish_reason"]
        assert len(row["ids"]) == len(row["tokens"]) == len(row["top_logprobs"]) > 0
        for id, logprob, top in zip(row["ids"], row["logprobs"], row.pop("top_logprobs")):
            known = {other["id"]: other["logprob"] for other in top}
            assert len(known) == 4 and [*known.values()] == sorted(known.values(), reverse=True)
            assert all(other["token"] == tokenizer.decode(other["id"]) for other in top)
            assert known.get(id, logprob) == logprob <= top[0]["logprob"]
            assert id == top[0]["id"] or flags[3] != 0
    assert found == plain


def test_tokens_together_are_the_text_with_what_ended_it_where_no_character_is_cut(capsys, model):
    flags = ["--prompt", "The", "--json", "--max-new-tokens", 9, "--num-samples", 60, "--top-p", 1]
    ended_by = {"length": ("",), "eot": ("<|endoftext|>",), "stop": ("e", "in")}
    seen = set()
    for row in rows(sample(capsys, model, *flags, "--stop", "e", "in")):
        together, reason = "".join(row["tokens"]), row["finish_reason"]
        if "\ufffd" not in together:
            seen.add(reason)
            rest = together.removeprefix(row["text"])
            assert together.startswith(row["text"]) and rest.startswith(ended_by[reason])
            assert reason == "stop" or rest in ended_by[reason]
    assert seen >= {"length", "stop"}


def test_every_prompt_of_a_file_is_continued_as_it_would_be_alone(capsys, model, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffThe sea\n\nA lamp,\\tand\\na wall \\\\ door\n" + "One\n" * 7, "utf-8")
    flags = ["--num-samples", 2, "--json", "--max-new-tokens", 7]
    together = rows(sample(capsys, model, "--prompts-file", path, *flags))
    prompts = ["The sea", "A lamp,\tand\na wall \\ door", *["One"] * 7]
    assert [(row["prompt"], row["sample"]) for row in together] == [
        (prompt, k) for prompt in prompts for k in (1, 2)
    ]
    for p, prompt in enumerate(prompts[:3]):
        alone = rows(sample(capsys, model, "--prompt", prompt, *flags))
        assert [row["ids"] for row in alone] == [row["ids"] for row in together[2 * p : 2 * p + 2]]
    texts = [row["text"] for row in together[4:]]
    assert texts == texts[:2] * 7 and texts[0] != texts[1], "equal prompts share random numbers"


def test_prompts_may_be_json_lines(capsys, model, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "A\\nb", "id": 3}\n\n{"prompt": ""}\n')
    found = rows(sample(capsys, model, "--prompts-file", path, "--json", "--max-new-tokens", 2))
    assert [row["prompt"] for row in found] == ["A\nb", ""]


def test_only_the_ends_of_lines_part_prompts(capsys, model, tmp_path):
    prompts = ["a\u2028b\x85c", "d\x0ce"]
    path = tmp_path / "prompts.txt"
    path.write_bytes("\r\n".join(prompts).encode())
    in_rows = tmp_path / "prompts.jsonl"
    lines = (json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts)
    in_rows.write_bytes("\r\n".join(lines).encode())
    for file in (path, in_rows):
        found = rows(sample(capsys, model, "--prompts-file", file, "--json", "--max-new-tokens", 1))
        assert [row["prompt"] for row in found] == prompts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "A"}\n{"text": "b"}\n', "a.jsonl, line 2 has no text in a field"),
        ("a.jsonl", "\n{no\n", "a.jsonl, line 2 is no JSON"),
        ("a.jsonl", "[1]\n", "line 1 has no text in a field prompt"),
        ("a.txt", "\n  \n", "a.txt holds no prompt: write one a line"),
        ("b.txt", None, "--prompts-file .*b.txt does not exist"),
        ("a.txt", b"A\xff", "is not UTF-8 at byte 1"),
    ],
)
def test_files_that_hold_no_prompts_are_refused(capsys, model, tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = sample(capsys, model, "--prompts-file", path)
    assert (result.code, result.out) == (2, "")
    assert re.search(message, result.last_line)


def test_several_samples_of_several_prompts_have_headings(capsys, model, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("The\nOne\n")
    flags = ["--num-samples", 2, "--max-new-tokens", 2]
    out = sample(capsys, model, "--prompts-file", path, *flags).out
    headings = re.findall("^--- (.*) ---$", out, re.MULTILINE)
    assert headings == [f"prompt {p} of 2, sample {k} of 2" for p in (1, 2) for k in (1, 2)]
    out = sample(capsys, model, "--prompt", "The", *flags).out
    assert re.findall("^--- (.*) ---$", out, re.MULTILINE) == ["sample 1 of 2", "sample 2 of 2"]


def test_text_ends_before_a_stop_text_that_lies_across_tokens(capsys, model):
    flags = ["--prompt", "The", "--json", "--max-new-tokens", 20]
    (free,) = rows(sample(capsys, model, *flags))
    pieces = Tokenizer.from_pretrained(model).written_bytes()
    first, second = next(
        (left, right)
        for left, right in itertools.pairwise(pieces[id] for id in free["ids"])
        if (left + right).isascii() and left.strip() and right.strip()
    )
    stop = (first[-1:] + second[:1]).decode()
    (row,) = rows(sample(capsys, model, *flags, "--stop", "never there", stop))
    assert row["finish_reason"] == "stop"
    assert row["text"] == free["text"][: free["text"].index(stop)]
    assert row["ids"] == free["ids"][: len(row["ids"])]


def test_ctrl_c_keeps_the_samples_that_are_written(capsys, model, monkeypatch):
    flags = ["--prompt", "The", "--json", "--max-new-tokens", 5, "--num-samples", 17]
    whole = rows(sample(capsys, model, *flags))
    left = iter([True, True])

    def until_the_third(*args, **kwargs):
        if not next(left, False):
            raise KeyboardInterrupt
        return complete(*args, **kwargs)

    monkeypatch.setattr(text_module, "complete", until_the_third)
    stopped = sample(capsys, model, *flags)
    assert stopped.code == 130 and "Traceback" not in stopped.err
    assert [json.loads(line) for line in stopped.out.splitlines()] == whole[:16]


class ErrorTerminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("n", "shown"), [(1, False), (9, True)])
def test_several_samples_show_their_progress_on_a_terminal_only(
    capsys, model, monkeypatch, n, shown
):
    flags = ["--prompt", "The", "--json", "--max-new-tokens", 5, "--num-samples", n]
    quiet = sample(capsys, model, *flags)
    assert "token" not in quiet.err
    monkeypatch.setattr(sys, "stderr", ErrorTerminal())
    assert sample(capsys, model, *flags).out == quiet.out
    assert ("/45 [" in sys.stderr.getvalue()) == shown


def test_banned_texts_and_repeated_ngrams_do_not_come(capsys, model):
    flags = ["--prompt", "The", "--json", "--max-new-tokens", 40, "--num-samples", 4]
    free = rows(sample(capsys, model, *flags))
    letters = sorted({c for row in free for c in row["text"] if c.isascii() and c.isalnum()})[:3]
    assert letters
    bans = [part for letter in letters for part in ("--ban", letter)][1:]
    banned = rows(sample(capsys, model, *flags, "--ban", *bans[::2]))
    assert not any(letter in row["text"] for row in banned for letter in letters)
    for row in rows(sample(capsys, model, *flags, "--no-repeat-ngram", 2)):
        ids = Tokenizer.from_pretrained(model).encode("The") + row["ids"]
        pairs = list(itertools.pairwise(ids))
        assert len(pairs) == len(set(pairs))


def test_stop_and_banned_texts_may_be_written_with_escapes(capsys, model):
    flags = ["--prompt", "The", "--json", "--max-new-tokens", 150, "--num-samples", 6, "--top-p", 1]
    free = [row["text"] for row in rows(sample(capsys, model, *flags))]
    assert any("\n" in text for text in free)
    stopped = [row["text"] for row in rows(sample(capsys, model, *flags, "--stop", "\\n"))]
    assert stopped == [text.partition("\n")[0] for text in free]
    banned = [row["text"] for row in rows(sample(capsys, model, *flags, "--ban", "\\n"))]
    assert not any("\n" in text for text in banned)


WRITTEN, MEANT = r"a\nb\tc\rd\\e \alpha", "a\nb\tc\rd\\e \\alpha"


def test_texts_of_flags_and_lines_of_prompts_are_understood_others_are_as_they_are(
    capsys, model, tmp_path, monkeypatch
):
    for name, text in {"one.txt": WRITTEN, "many.txt": WRITTEN, "rows.jsonl": ""}.items():
        row = json.dumps({"prompt": WRITTEN})
        (tmp_path / name).write_text(text or row)

    def prompt(*flags):
        result = sample(capsys, model, *flags, "--max-new-tokens", 0, "--json")
        return rows(result)[0]["prompt"], "stand for other characters" in result.err

    assert prompt("--prompt", WRITTEN) == (MEANT, True)
    assert prompt("--prompt", r"\alpha C:\dir") == (r"\alpha C:\dir", False)
    assert prompt("--prompts-file", tmp_path / "many.txt") == (MEANT, False)
    assert prompt("--prompt-file", tmp_path / "one.txt") == (WRITTEN, False)
    assert prompt("--prompts-file", tmp_path / "rows.jsonl") == (WRITTEN, False)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(WRITTEN.encode())))
    assert prompt("--prompt", "-") == (WRITTEN, False)
    options = SampleOptions(prompt=WRITTEN, stop=(WRITTEN,), ban=(WRITTEN,))
    shared = sample_command.decoding(options)
    assert shared["stop"] == shared["ban"] == [MEANT]
    assert TextConfig(document_separator=WRITTEN).separator == MEANT


@pytest.mark.parametrize("more", [["--guess", 3], ["--draft"]], ids=str)
def test_guessing_ahead_writes_the_same_greedy_text_and_says_what_it_brought(capsys, model, more):
    more = [*more, model] if more == ["--draft"] else more
    flags = ["--prompt", "The The The", "--temperature", 0, "--max-new-tokens", 50]
    plain = sample(capsys, model, *flags)
    ahead = sample(capsys, model, *flags, *more)
    assert ahead.out == plain.out
    (found,) = re.findall(r"^tokens per forward pass: (\d\.\d\d)$", ahead.err, re.MULTILINE)
    assert 1 <= float(found) <= 5 and "forward pass" not in plain.err
    if "--draft" in more:
        assert float(found) > 4  # it drafts for itself: all stays


@pytest.mark.parametrize("more", [["--guess", 5], ["--draft"]], ids=str)
def test_sample_k_of_a_prompt_is_the_same_beside_others_when_guessing_too(
    capsys, model, tmp_path, more
):
    other = GPT2.from_pretrained(model)
    with torch.no_grad():
        other.h[0].mlp.c_proj.weight.add_(0.3)
    other.save_pretrained(tmp_path / "other", Tokenizer.from_pretrained(model))
    more = [*more, tmp_path / "other"] if more == ["--draft"] else more
    path = tmp_path / "prompts.txt"
    path.write_text("The The\nA lamp A lamp\n")
    flags = ["--json", "--max-new-tokens", 40, *more]
    together = rows(sample(capsys, model, "--prompts-file", path, "--num-samples", 3, *flags))
    for p, prompt in enumerate(path.read_text().splitlines()):
        for n in (1, 2):
            alone = rows(sample(capsys, model, "--prompt", prompt, "--num-samples", n, *flags))
            assert [row["ids"] for row in alone] == [
                row["ids"] for row in together[3 * p : 3 * p + n]
            ]


def test_a_draft_may_have_rows_of_padding_that_the_model_has_not(capsys, model, tmp_path):
    padded = tiny_folder(tmp_path / "padded", vocab_size=311)  # with the same 300 tokens
    flags = ["--prompt", "The", "--json", "--max-new-tokens", 40, "--temperature", 1.2]
    (row,) = rows(sample(capsys, model, *flags, "--draft", padded))
    assert len(row["ids"]) == 40 or row["finish_reason"] == "eot"
    (row,) = rows(sample(capsys, padded, *flags, "--draft", model))
    assert max(row["ids"]) < 300


def test_a_draft_with_other_tokens_is_refused(capsys, model, tmp_path):
    other = tiny_folder(tmp_path / "other", vocab_size=290)
    result = sample(capsys, model, "--prompt", "x", "--draft", other)
    assert result.code == 2 and "has other tokens than --model" in result.last_line


@pytest.mark.parametrize("more", [[], ["--dtype", "int8"], ["--dtype", "bfloat16"]], ids=str)
def test_what_has_no_part_to_compile_is_said(capsys, model, more):
    flags = ["--prompt", "The", "--device", "cpu", "--max-new-tokens", 2, *more]
    assert "--compile" not in sample(capsys, model, *flags).err
    nothing = "--compile changes nothing: on cpu only --dtype float32 and int8 have something"
    said = f"{nothing} to compile\n"
    assert (said in sample(capsys, model, *flags, "--compile").err) == ("bfloat16" in more)


def test_debug_shows_the_routine_that_was_chosen_and_why(capsys, model):
    flags = ["--prompt", "The", "--device", "cpu", "--max-new-tokens", 2]
    reasons = {"auto": "the matrices are small", "slices": "as asked for"}
    for routine, reason in reasons.items():
        name = "plain" if routine == "auto" else routine
        line = f"products on the CPU: {name} ({reason})\n"
        asked = [*flags, "--cpu-routine", routine]
        assert line in sample(capsys, model, *asked, "--debug").err
        assert "products" not in sample(capsys, model, *asked).err


def test_a_routine_for_what_is_not_float32_is_refused_in_a_line(capsys, model):
    flags = ["--prompt", "The", "--device", "cpu", "--cpu-routine", "plain", "--dtype", "int8"]
    result = sample(capsys, model, *flags)
    assert result.code == 2 and result.last_line == (
        "error: --cpu-routine is 'plain', allowed is auto for int8 on cpu: others are for float32 "
        "on the CPU"
    )
    result = sample(capsys, model, *flags[:-2], "--compile")
    assert result.code == 2 and "--cpu-routine plain is given beside --compile" in result.last_line


@pytest.mark.parametrize("more", [["--dtype", "int8"], ["--dtype", "int8", "--compile"]], ids=str)
def test_int8_writes_text(capsys, model, more):
    (row,) = rows(sample(capsys, model, "--prompt", "The", "--json", *more))
    (exact,) = rows(sample(capsys, model, "--prompt", "The", "--json"))
    assert row["logprobs"][0] != exact["logprobs"][0]
    assert row["logprobs"][0] == pytest.approx(exact["logprobs"][0], abs=0.5) or (
        row["ids"][0] != exact["ids"][0]
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "x", "--guess", 65], "--guess is 65, allowed is from 0"),
        (["--prompt", "x", "--top-logprobs", 2], "--top-logprobs is written with --json only"),
        (["--prompt", "x", "--json", "--top-logprobs", -1], "--top-logprobs is -1, allowed is 0"),
        (
            ["--prompt", "x", "--json", "--top-logprobs", 301],
            "--top-logprobs is 301, allowed is from 0 to the 300 tokens that there are",
        ),
        (["--interactive", "--top-logprobs", 2], "--top-logprobs is written with --json only"),
        (["--prompt", "x", "--ban", ""], "--ban holds an empty text"),
        (["--prompt", "x", "--stop", ""], "--stop holds an empty text"),
        (["--prompt", "x", "--no-repeat-ngram", -1], "--no-repeat-ngram is -1"),
        (["--prompt", "x", "--prompts-file", "y"], "exactly one of --prompt"),
        (["--prompt", "x", "--dtype", "int4"], "int4"),
        (["--interactive", "--json"], "leave out --json and --num-samples"),
        (["--interactive", "--num-samples", 2], "leave out --json and --num-samples"),
    ],
)
def test_flags_that_make_no_sense_are_refused_in_one_line(capsys, model, flags, message):
    result = sample(capsys, model, *flags)
    assert result.code == 2 and message in result.last_line


def test_a_text_that_is_to_finish_its_sentence_may_be_longer(capsys, model):
    flags = ["--prompt", "The", "--json", "--num-samples", 4, "--max-new-tokens", 5]
    for row in rows(sample(capsys, model, *flags, "--finish-sentence")):
        assert (len(row["ids"]) > 5) or row["finish_reason"] != "length"


class Terminal:
    """sample.py --interactive on a terminal of its own."""

    def __init__(self, model, *more):
        self.main, side = pty.openpty()
        command = [sys.executable, str(ROOT / "sample.py"), "--model", str(model)]
        self.process = subprocess.Popen(
            [*command, "--interactive", *map(str, more)], stdin=side, stdout=side, stderr=side,
            start_new_session=True, preexec_fn=lambda: __import__("fcntl").ioctl(0, 0x540E, 0),
        )  # fmt: skip
        os.close(side)
        self.seen = ""

    def until(self, text, count=1, seconds=60):
        """Read until the text was seen so often; whether it was."""
        deadline = time.monotonic() + seconds
        while self.seen.count(text) < count and time.monotonic() < deadline:
            if select.select([self.main], [], [], 0.1)[0]:
                self.seen += os.read(self.main, 4096).decode(errors="replace")
        return self.seen.count(text) >= count

    def type(self, text):
        os.write(self.main, text.encode())

    def end(self):
        self.type("\x04")
        code = self.process.wait(60)
        os.close(self.main)
        return code


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="terminal numbers of Linux")
def test_at_a_terminal_ctrl_c_stops_the_answer_and_history_is_kept(model, tmp_path):
    terminal = Terminal(model, "--max-new-tokens", 10_000_000)
    assert terminal.until("> ")
    interrupts = iter(range(20))
    terminal.type("half a line")
    # a person presses again: an interrupt is lost in a destructor, and waits for the next key when
    # it comes between the prompt and the waiting
    while not terminal.until("\r\n> ", 1, seconds=2):
        assert next(interrupts) < 9, terminal.seen[-300:]
        terminal.type("\x03")
    terminal.type("The lamp\n")
    assert terminal.until("The lamp", 2)  # typed, and written: the answer has begun
    before = terminal.seen.count("\r\n> ")
    while not terminal.until("\r\n> ", before + 1, seconds=0.5):
        assert next(interrupts) < 19, terminal.seen[-300:]
        os.killpg(terminal.process.pid, signal.SIGINT)
    assert terminal.process.poll() is None
    assert terminal.end() == 0
    assert "Traceback" not in terminal.seen
    history = tmp_path / "cache" / "history"
    assert "The lamp" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    again = Terminal(model, "--max-new-tokens", 1)
    assert again.until("> ")
    again.type("\x1b[A\n")  # the arrow up brings it back
    assert again.until("The lamp", 2) and again.until("> ", 2)
    assert again.end() == 0


def test_the_same_prompt_gets_another_answer_when_it_is_asked_again(capsys, model, monkeypatch):
    answers = iter(["The", "", "The"])

    def ask():
        try:
            return next(answers)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("minigpt2.cli.prompts._line", ask)
    result = sample(capsys, model, "--interactive", "--max-new-tokens", 9)
    assert result.code == 0
    expected = [
        complete(
            GPT2.from_pretrained(model), Tokenizer.from_pretrained(model), [prompt],
            rows=[number], max_new_tokens=9, seed=1337,
            sampling=SamplingConfig(temperature=0.8, top_p=0.95),
        )[0].text
        for number, prompt in enumerate(["The", "", "The"])
    ]  # fmt: skip
    assert expected[0] != expected[2]
    assert result.out == f"The{expected[0]}\n{expected[1]}\nThe{expected[2]}\n\n"


def test_an_error_in_one_answer_does_not_end_the_conversation(capsys, model, monkeypatch):
    answers = iter(["a", "The"])

    def ask():
        try:
            return next(answers)
        except StopIteration:
            raise EOFError from None

    def broken_once(self, tail, mask=BannedTexts.mask):
        monkeypatch.setattr(BannedTexts, "mask", mask)
        raise InputError("no token is left")

    monkeypatch.setattr(BannedTexts, "mask", broken_once)
    monkeypatch.setattr("minigpt2.cli.prompts._line", ask)
    result = sample(capsys, model, "--interactive", "--max-new-tokens", 3, "--ban", "x")
    assert result.code == 0 and "error: no token is left" in result.err
    assert "The" in result.out
