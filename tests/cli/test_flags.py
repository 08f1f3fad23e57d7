"""The words of a command line: none is lost, none wins in silence, and the help says what there
is.
"""

import subprocess
import sys
from dataclasses import fields, is_dataclass
from typing import get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt2.cli.console import parse, run_script
from minigpt2.cli.flags import CommandLine
from minigpt2.corpus.options import CorpusOptions, VocabularyOptions
from minigpt2.decoding.options import SampleOptions
from minigpt2.errors import InputError
from minigpt2.evaluation.options import EvaluateOptions, VerifyOptions
from minigpt2.explain.options import ExplainOptions
from minigpt2.formats.options import ConvertOptions
from minigpt2.training.options import TrainOptions
from scripts import ROOT

COMMANDS = {  # what is typed, options, whether required fields take no flag, words that are enough
    "sample.py": (SampleOptions, False, ["--prompt", "x"]),
    "train.py": (TrainOptions, False, ["--data", "x"]),
    "convert_weights.py": (ConvertOptions, True, ["a", "b"]),
    "-m minigpt2.corpus": (CorpusOptions, True, ["a"]),
    "-m minigpt2.corpus vocabulary": (VocabularyOptions, True, ["a", "--out", "b"]),
    "-m minigpt2 evaluate": (EvaluateOptions, False, ["--data", "x"]),
    "-m minigpt2 verify": (VerifyOptions, False, []),
    "-m minigpt2 explain": (ExplainOptions, False, ["--prompt", "a"]),
}
EVERY_COMMAND = pytest.mark.parametrize(
    ("options_class", "positional", "enough"), COMMANDS.values(), ids=COMMANDS
)


def leaves(options_class):
    """(field, type) of an options class and of those in it."""
    for name, kind in get_type_hints(options_class).items():
        if name in {field.name for field in fields(options_class)}:
            yield from leaves(kind) if is_dataclass(kind) else [(name, kind)]


def values_for(name, kind):
    """Two values that a flag takes."""
    choices = {"preset": ("nano", "gpt2"), "dtype": ("float32", "float16"), "to": ("hf", "hf")}
    choices |= {"cpu_routine": ("plain", "packed")}
    choices |= {"task": ("ptb", "hellaswag")}
    return choices.get(name, ("keep", "drop") if name == "duplicates" else ("1", "2"))


@EVERY_COMMAND
def test_every_flag_given_twice_is_refused_by_name_with_both_values(
    options_class, positional, enough
):
    for name, kind in leaves(options_class):
        flag = "--" + name.replace("_", "-")
        if positional and name in ("source", "dest", "paths"):
            continue
        rest = [] if flag in enough else enough
        if kind in (bool, bool | None):
            with pytest.raises(InputError, match=rf"^{flag} is given twice: give it once"):
                parse(options_class, [*rest, flag, flag], positional=positional)
            with pytest.raises(InputError, match=rf"^{flag} and --no-{flag[2:]} are both given"):
                parse(options_class, [*rest, flag, f"--no-{flag[2:]}"], positional=positional)
            continue
        one, other = values_for(name, kind)
        for spelled in (["--" + name, other], [f"{flag}={other}"], [f"--{name}={other}"]):
            with pytest.raises(InputError) as refusal:
                parse(options_class, [*rest, flag, one, *spelled], positional=positional)
            assert f"{flag} is given twice, as '{one}' and as '{other}'" in str(refusal.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--prompt x --promt y", "there is no flag '--promt' (did you mean --prompt?); see --help"),
        ("--prompt x --num_sampels=3", "no flag '--num_sampels' (did you mean --num-samples?)"),
        ("--prompt x -model y", "there is no flag '-model' (did you mean --model?)"),
        ("--prompt x --versoin", "(did you mean --version?)"),
        ("--prompt x --qqqq", "there is no flag '--qqqq'; see --help"),
        ("--prompt x --dtype float32x", "'float32x', allowed is auto, float32, bfloat16, float16, "
         "int8 (did you mean float32?)"),
        ("--prompt The sea", "'sea' belongs to no flag: a text with spaces in it needs quotes"),
        ("--prompt x --json=yes", "--json takes no value: leave out '=yes'"),
        ("--prompt x --top-k 1.5", "--top-k is '1.5', allowed is a whole number"),
        ("--prompt x --top-p much", "--top-p is 'much', allowed is a number"),
        ("--prompt --json", "--prompt lacks its value; one that begins with - is written as"),
        ("--prompt", "--prompt lacks its value"),
        ("--prompt x --stop --json", "--stop lacks its value"),
    ],
)  # fmt: skip
def test_a_word_that_is_wrong_is_named_with_what_was_meant(argv, message):
    with pytest.raises(InputError) as refusal:
        parse(SampleOptions, argv.split())
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_choices_are_named_as_they_are_declared():
    with pytest.raises(InputError) as refusal:
        parse(TrainOptions, ["--data", "x", "--preset", "gpt"])
    assert str(refusal.value) == (
        "--preset is 'gpt', allowed is nano, gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2 "
        "(did you mean gpt2?); see --help"
    )


def test_values_that_look_like_flags_are_values_where_they_can_be():
    options = parse(SampleOptions, ["--prompt=--stop", "--stop", "---", "-3", "--ban=--stop"])
    assert (options.prompt, options.stop, options.ban) == ("--stop", ("---", "-3"), ("--stop",))
    options = parse(SampleOptions, ["--prompt", "the flag --prompt x", "--stop=a", "b=c"])
    assert (options.prompt, options.stop) == ("the flag --prompt x", ("a", "b=c"))
    with pytest.raises(InputError, match="--prompt is given twice, as 'a' and as '--prompt'"):
        parse(SampleOptions, ["--prompt=a", "--prompt=--prompt"])
    assert parse(CorpusOptions, ["a", "--", "--json"], positional=True).paths == ("a", "--json")


@pytest.mark.parametrize(
    ("options_class", "both"),
    [(TrainOptions, {"data": ("x",)}), (CorpusOptions, {"paths": ("x",)})],
)
def test_a_model_and_a_preset_are_one_too_many(options_class, both):
    with pytest.raises(InputError, match="--preset nano and --model gpt2 are both given: choose"):
        options_class(**both, preset="nano", model="gpt2")
    assert options_class(**both).source == "gpt2"
    assert options_class(**both, model="x").source == "x"
    assert options_class(**both, preset="nano").source == "nano"


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(
    ["--prompt", "--stop", "--json", "--no-json", "--top-k", "--prompt=", "--stop=-x", "--top_k=3",
     "--", "-", "---", "-x", "-3", "3", "a", "--nan", "-inf", "", "=", "--=", "--json=", "--help="]
), max_size=6))  # fmt: skip
def test_what_is_understood_here_is_what_the_options_are_made_of(words):
    line = CommandLine(SampleOptions)
    try:
        given_fields = line.given(words)
    except InputError:
        return
    try:
        options = parse(SampleOptions, words)
    except InputError as refusal:
        reasons = ("exactly one of --prompt", "empty", "--top-k is -3")
        assert any(reason in str(refusal) for reason in reasons) or (
            "Unrecognized" in str(refusal) and "--" in words
        ), refusal  # fmt: skip
        return
    default = {**vars(SampleOptions(prompt="")), **vars(options.sampling)}
    values = {**vars(options), **vars(options.sampling)}
    changed = {name for name in ("stop", "json", "top_k") if values[name] != default.get(name)}
    assert changed - {"top_k"} <= given_fields.keys() and "prompt" in given_fields


@pytest.mark.parametrize(
    "argv", ["--interactive --version", "--stop a --version", "--json --version"]
)
def test_version_after_a_switch_or_a_value_is_a_flag(argv, capsys):
    assert run_script(lambda options: 3, SampleOptions, argv.split()) == 0
    assert capsys.readouterr().out.startswith("minigpt2 ")


def help_of(options_class, positional, monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as stop:
        parse(options_class, ["--help"], positional=positional)
    assert stop.value.code == 0
    return capsys.readouterr().out


@EVERY_COMMAND
@pytest.mark.parametrize("columns", [80, 100, 200])
def test_the_help_says_what_every_flag_does_and_nothing_else(
    options_class, positional, enough, columns, monkeypatch, capsys
):
    shown = help_of(options_class, positional, monkeypatch, capsys, columns)
    for line in shown.splitlines():
        assert line == line.rstrip() and len(line) <= min(columns, 100)
    assert "None" not in shown and "default: )" not in shown and "False" not in shown
    assert "gentler than" not in shown, "a comment in the code"
    lines = shown.splitlines()
    for name, _ in leaves(options_class):
        loose = positional and name in ("source", "dest", "paths")
        flag = name.upper() if loose else "--" + name.replace("_", "-")
        (at,) = [
            n
            for n, line in enumerate(lines)
            if f"{line} ".replace("...", " ").startswith(f"  {flag} ")
        ]
        does = lines[at][22:].strip() if len(lines[at]) > 22 and lines[at][20:22] == "  " else ""
        assert does or lines[at + 1].startswith(" " * 22), f"{flag} has no help"


def test_the_help_tells_defaults_of_the_script_not_of_the_library(monkeypatch, capsys):
    shown = " ".join(help_of(SampleOptions, False, monkeypatch, capsys, 100).split())
    assert "always takes the likeliest token. (default: 0.8)" in shown
    assert "1 keeps all. (default: 0.95)" in shown
    assert "--num-samples N" in shown and "(default: 1)" in shown


@pytest.mark.parametrize(
    "argv",
    ["sample.py --help", "train.py --dat x", "sample.py --prompt x --dtype int4",
     "sample.py --prompt x --prompt y", "-m minigpt2.corpus --help", "sample.py --version",
     "train.py --data x --preset nano --model gpt2", "convert_weights.py a b --forc",
     "sample.py --prompt x --model tests/tset", "sample.py --prompt-file none",
     "sample.py --prompt x --draft ./none --model tests", "train.py --data README.mb",
     "train.py --data README.md --model tests/none", "convert_weights.py tests/none new",
     "-m minigpt2.corpus README.md --model tests/none", "-m minigpt2.corpus README.mb"],
)  # fmt: skip
def test_what_the_words_say_needs_no_torch(argv):
    code = "import runpy, sys\nsys.argv = sys.argv[1:]\ntry:\n"
    if argv.startswith("-m"):
        code += "    runpy.run_module('minigpt2.corpus', run_name='__main__', alter_sys=True)\n"
        words = argv.split()[1:]
    else:
        code += "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        words = [str(ROOT / argv.split()[0]), *argv.split()[1:]]
    code += "finally:\n    print('torch' in sys.modules, file=sys.stderr)\n"
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr.splitlines()[-1] == "False", done.stderr
