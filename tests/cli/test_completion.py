"""A shell completes the commands, flags and choices that there are."""

import shutil
import subprocess
import sys

import pytest

from minigpt2 import PRESETS
from minigpt2.__main__ import COMMANDS, main
from minigpt2.cli import completion
from minigpt2.cli.flags import CommandLine
from minigpt2.errors import InputError

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
FLAG = "--tyro-print-completion"
SHOW = (
    'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
    'compopt() { :; }; _tyro_minigpt2; printf "%s\\n" "${COMPREPLY[@]}"'
)


@pytest.fixture(scope="module")
def completed(tmp_path_factory):
    """A function from the words of a command to what bash offers for the last one."""
    path = tmp_path_factory.mktemp("completion") / "minigpt2"
    path.write_text(completion.script(["bash"]))

    def offered(*words):
        command = ["bash", "-c", SHOW, "bash", str(path), "minigpt2", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return {word.strip() for word in done.stdout.split("\n")} - {""}

    return offered


def test_every_command_is_offered(completed):
    assert completed("") >= {*COMMANDS} == {*completion.OPTIONS}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_a_command_is_offered(completed, command):
    positional = command in ("convert", "corpus", "report")
    flags = CommandLine(completion.OPTIONS[command], positional=positional)
    names = {flag.name for flag in flags._flags.values() if not flag.positional}
    assert completed(command, "--") >= names


def test_choices_are_offered_and_no_words_of_a_description(completed):
    assert completed("train", "--preset", "") == {*PRESETS}
    assert completed("sample", "--dtype", "b") == {"bfloat16"}
    assert completed("train", "--lora-r") == {"--lora-rank"}


def test_bash_offers_files_where_nothing_of_ours_is():
    line = 'source <(echo "$1"); complete -p minigpt2'
    command = ["bash", "-c", line, "bash", completion.script(["bash"])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "complete -o bashdefault -o default -F _tyro_minigpt2 minigpt2\n"


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_the_command_prints_it_without_torch(shell):
    code = f"import sys; from minigpt2.__main__ import main; main(['{FLAG}', '{shell}']); "
    code += "print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "minigpt2" in done.stdout and done.stderr == "False\n"


@pytest.mark.parametrize("words", [[], ["fish"], ["bash", "zsh"]])
def test_another_shell_is_told_in_a_line(words, capsys):
    with pytest.raises(InputError, match="takes one of bash, zsh"):
        completion.script(words)
    assert main([FLAG, *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1
