"""What is printed can be pasted, and a flag in the place of a value is none."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt2 import __version__
from minigpt2.cli import console
from minigpt2.cli.console import explain, parse, pasteable, run_script
from minigpt2.decoding.options import SampleOptions
from minigpt2.errors import InputError, OptionError
from minigpt2.training.options import TrainOptions
from scripts import words_of

words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=9)
posix_shell = pytest.mark.skipif(shutil.which("bash") is None, reason="needs a shell such as bash")


@posix_shell
@settings(max_examples=5, deadline=None)
@given(st.lists(words, min_size=50, max_size=99))
def test_any_words_come_back_from_a_pasteable_command(given_words):
    assert words_of(pasteable(given_words)) == given_words
    assert pasteable(given_words).isprintable()


@posix_shell
def test_names_that_are_no_text_come_back_too():
    name = os.fsdecode(b"a\xff\x1b[2J'\\")
    assert pasteable([name]) == r"$'a\377\033[2J\'\\'"
    command = f"printf %s {pasteable([name])}"
    assert subprocess.check_output(["bash", "-c", command]) == os.fsencode(name)


@posix_shell
def test_a_shell_reads_the_words_that_were_meant():
    meant = ["a b", "it's", '"', "$HOME", "`x`", "a;b", "two\nlines", "*", "~", "", "#", "-x", "é"]
    script = "import json, sys; print(json.dumps(sys.argv[1:]))"
    command = pasteable([sys.executable, "-c", script, *meant])
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == meant


def test_on_windows_words_are_quoted_as_its_programs_read_them(monkeypatch):
    monkeypatch.setattr(console, "os", SimpleNamespace(name="nt"))
    assert pasteable(["train.py", "--out", r"C:\my run", "it's"]) == (
        r"""train.py --out "C:\my run" it's"""
    )


@pytest.mark.parametrize("argv", ["--version", "--version --help", "--data x --version"])
def test_version_is_a_flag(argv, capsys):
    assert run_script(lambda options: 3, TrainOptions, argv.split()) == 0
    assert capsys.readouterr().out == f"minigpt2 {__version__}\n"


def test_version_in_the_place_of_a_value_is_no_flag(capsys):
    assert run_script(lambda options: 0, SampleOptions, ["--prompt", "--version"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "error: --prompt lacks its value; one that begins with - is written as --prompt=VALUE; "
        "see --help\n"
    )


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_an_unknown_flag_is_one_line_whatever_the_output_can_show(encoding):
    code = "import sys; from minigpt2.cli import console; from minigpt2.training import options\n"
    code += "sys.exit(console.run_script(print, options.TrainOptions, ['--data', 'x', '--epochz']))"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.decode() == (
        "error: there is no flag '--epochz' (did you mean --epochs?); see --help\n"
    )


def test_version_may_be_a_value():
    seen = []
    assert run_script(seen.append, SampleOptions, ["--prompt=--version"]) == 0
    assert seen[0].prompt == "--version"


def test_a_value_that_begins_with_a_dash_is_given_as_the_message_says():
    with pytest.raises(InputError, match="is written as --prompt=VALUE"):
        parse(SampleOptions, ["--prompt", "-x"])
    assert parse(SampleOptions, ["--prompt=-x"]).prompt == "-x"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--temperature -1", "--temperature is -1.0, allowed is 0 or more; see --help"),
        ("--top-k -1", "--top-k is -1, allowed is 0 (off) or more; see --help"),
        ("--max-new-tokens -1", "--max-new-tokens is -1, allowed is 0 or more; see --help"),
    ],
)
def test_what_the_options_refuse_is_said_of_the_flags(flags, told):
    with pytest.raises(InputError) as caught:
        parse(SampleOptions, ["--prompt", "x", *flags.split()])
    assert str(caught.value) == told


def test_what_the_library_refuses_is_said_of_the_flags():
    assert explain(OptionError("seed is x", "seed")) == "--seed is x"


LEAVES = """
import atexit, sys
from minigpt2.cli.console import leave

class Last:
    def __del__(self, write=print):
        write("modules are taken down", flush=True)

sys.modules["last"] = Last()
atexit.register(print, "at exit", end="")
print("result", end=" ")
print("message", end=" ", file=sys.stderr)
leave(int(sys.argv[1]))
"""


@pytest.mark.parametrize("code", [0, 2, 143])
def test_a_process_of_several_ends_with_all_said_before_modules_are_taken_down(code):
    ends = {}
    for name in ("alone", "RANK"):
        process = subprocess.run(
            [sys.executable, "-c", LEAVES, str(code)],
            env={**os.environ, name: "1"},
            capture_output=True,
            text=True,
        )
        assert (process.returncode, process.stderr) == (code, "message ")
        ends[name] = process.stdout
    assert ends["RANK"] == "result at exit"
    assert ends["alone"] == ends["RANK"] + "modules are taken down\n"
