"""Where prompts come from, and where they are remembered."""

import builtins
import io
import logging
import os
import stat
from types import SimpleNamespace

import pytest

from minigpt2.cli import prompts
from minigpt2.cli.prompts import asked
from minigpt2.decoding.options import SampleOptions
from minigpt2.errors import InputError

readline = pytest.importorskip("readline")


@pytest.fixture(autouse=True)
def one_prompt(tmp_path, monkeypatch):
    """A person who types one prompt and Ctrl-D."""
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "cache"))
    readline.clear_history()

    typed = iter(["One lamp"])

    def type_one(prompt):
        if (text := next(typed, None)) is None:
            raise EOFError
        readline.add_history(text)
        return text

    monkeypatch.setattr(builtins, "input", type_one)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    yield
    readline.clear_history()


def test_prompts_are_remembered_for_this_user_alone(tmp_path, caplog):
    assert list(asked()) == ["One lamp"]
    path = tmp_path / "cache" / "history"
    assert path.read_text().splitlines()[-1] == "One lamp"
    assert [stat.S_IMODE(p.stat().st_mode) for p in (path, path.parent)] == [0o600, 0o700]
    assert not caplog.records


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
def test_nothing_is_remembered_where_others_can_make_a_link(tmp_path, caplog):
    victim, cache = tmp_path / "victim", tmp_path / "cache"
    victim.write_text("alias a=b")
    cache.mkdir()
    (cache / "history").symlink_to(victim)
    cache.chmod(0o777)
    with caplog.at_level(logging.INFO):
        assert list(asked()) == ["One lamp"]
    assert victim.read_text() == "alias a=b"
    assert f"prompts are not remembered: others can write to {cache}" in caplog.text


def test_a_stdin_without_an_end_is_refused(monkeypatch):
    monkeypatch.setattr(prompts, "LONGEST", 5)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a" * 6)))
    with pytest.raises(InputError, match="more than 5 bytes"):
        prompts.read_prompts(SampleOptions(prompt="-"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a" * 5)))
    assert prompts.read_prompts(SampleOptions(prompt="-")) == ["aaaaa"]


def test_what_is_no_terminal_is_read_by_lines_that_have_an_end(monkeypatch, capsys):
    monkeypatch.setattr(prompts, "LONGEST", 5)
    monkeypatch.setattr("sys.stdin", io.StringIO("One\n\nlamps"))
    assert list(asked()) == ["One", "", "lamps"]
    assert capsys.readouterr().out == "> > > > \n"
    monkeypatch.setattr("sys.stdin", io.StringIO("\0" * 6))
    with pytest.raises(InputError, match="stdin has a line of more than 5 characters"):
        list(asked())
