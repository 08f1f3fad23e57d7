"""The notebook is executed as a person does it, with a tiny model; and what is committed of it is
short, tells nothing of a machine, and is opened as the README says.
"""

import json
import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest
import renew_notebook
import torch
from renew_notebook import NOTEBOOK, ROOT, cell, code, executed

from minigpt2 import GPT2, Run, finetune
from minigpt2.system.signals import MOMENT

COMMITTED = json.loads(NOTEBOOK.read_text("utf-8"))
RENEW = "python tests/renew_notebook.py --write renews it"
TINY = """\
data = [home / "sallow-point.txt"]
model = None
out = home / "runs" / "mine"
settings = {"preset": "nano", "max_steps": 4, "batch_size": 2, "block_size": 16, "workers": 1}
settings |= {"eval_every": 2, "val_fraction": 0.02, "device": "cpu"}
"""
# a notebook's client says so of every kernel that has a port
pytestmark = pytest.mark.filterwarnings("ignore:.*without encryption", "ignore::DeprecationWarning")


def text_of(cell):
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The notebook after its last cell, and the folder that it ran in."""
    folder = tmp_path_factory.mktemp("notebook")
    return executed(COMMITTED, folder, TINY), folder


def test_it_trains_shows_and_packs_what_others_open(ran):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    after, folder = ran
    told = text_of(cell(after, "train"))
    lines = [line for line in told.splitlines() if line.startswith("step ")]
    assert [int(line.split()[1]) for line in lines] == [0, 2, 4]
    assert re.search(r"100%\|█+\| 4/4 \[.*, loss \d", told), "the bar is drawn over itself"
    assert "\x1b" not in told and told.count("4/4") == 1
    assert "nothing to do" in text_of(cell(after, "resume"))
    (shown,) = [o["data"]["text/html"] for c in code(after) for o in c["outputs"] if "data" in o]
    assert "best at step" in shown and "data:image/png;base64," in shown and "<iframe" in shown
    shutil.unpack_archive(folder / "my-gpt2.zip", folder / "unpacked")
    theirs = AutoModelForCausalLM.from_pretrained(folder / "unpacked" / "my-gpt2")
    ids = AutoTokenizer.from_pretrained(folder / "unpacked" / "my-gpt2")("The lamp").input_ids
    ours = GPT2.from_pretrained(folder / "runs" / "mine")
    idx = torch.tensor([ids])
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_after_a_disconnect_all_cells_but_the_training_go_on_with_the_run(
    ran, tmp_path, monkeypatch
):
    import signal
    import time

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "cache"))
    shutil.copy(ROOT / "data" / "sallow-point.txt", tmp_path)
    given = {"home": Path()}
    parameters(given)

    def disconnect(metrics):
        if metrics.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(2 * MOMENT)

    with pytest.raises(KeyboardInterrupt):
        finetune(data=given["data"], out=given["out"], progress=disconnect, **given["settings"])
    assert Run.open(given["out"]).metrics[-1].step == 3
    after = executed(COMMITTED, tmp_path, TINY, without=("train",))
    assert "100%" in text_of(cell(after, "resume"))
    whole, resumed = (GPT2.from_pretrained(f / "runs" / "mine") for f in (ran[1], tmp_path))
    for one, two in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(one, two)


def parameters(names):
    """What the parameters' cell of the tests gives its names."""
    exec(compile(TINY, "parameters", "exec"), names)


def test_what_is_committed_is_a_notebook_short_and_of_no_machine():
    nbformat.validate(nbformat.reads(json.dumps(COMMITTED), as_version=4))
    text = NOTEBOOK.read_text("utf-8")
    assert len(text) < 100_000
    plain = re.sub(r"base64,[^\"]*", "", text)
    assert not re.search(r"/(tmp|home|root|Users|var|opt)\b|Linux|Windows|Traceback|u001b", plain)
    counts = [c["execution_count"] for c in code(COMMITTED)]
    assert counts == [*range(1, len(counts) + 1)], RENEW
    assert all(len(c["source"]) <= 10 for c in code(COMMITTED))
    kinds = [c["cell_type"] for c in COMMITTED["cells"]]
    assert kinds == ["markdown", *["markdown", "code"] * len(counts)], "a sentence before each"
    for told in ("".join(c["source"]) for c in COMMITTED["cells"][1::2]):
        assert told[-1] in ".:" and ". " not in told


def test_its_own_torch_is_kept():
    install = "".join(cell(COMMITTED, "install")["source"])
    assert "%pip install -q {source}" in install and "torch" not in install
    floor = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    assert floor and f"new enough ({floor[1]})" in NOTEBOOK.read_text("utf-8")


def test_the_readme_and_the_notebook_say_how_it_is_opened():
    repository = renew_notebook.repository()
    readme = (ROOT / "README.md").read_text("utf-8")
    assert readme == renew_notebook.in_readme(readme, repository), RENEW
    assert renew_notebook.in_notebook(COMMITTED, repository) == COMMITTED, RENEW


def test_a_projects_address_makes_the_badge_and_what_is_installed():
    project = '[project]\nname = "x"\n[project.urls]\nHomepage = "https://example.org"\n'
    assert (
        renew_notebook.repository(project) is None
        and renew_notebook.repository("[project]\n") is None
    )
    project += 'Source = "https://github.com/some-one/some.thing.git"\n[tool.x]\n'
    repository = renew_notebook.repository(project)
    assert repository == "some-one/some.thing"
    readme = renew_notebook.in_readme((ROOT / "README.md").read_text("utf-8"), repository)
    page = "colab.research.google.com/github/some-one/some.thing/blob/main/notebooks/finetune.ipynb"
    assert f"](https://{page})" in readme and "Google Drive as `minigpt2`" not in readme
    changed = renew_notebook.in_notebook(COMMITTED, repository)
    assert page in "".join(changed["cells"][0]["source"])
    expected = 'source = "git+https://github.com/some-one/some.thing"\n'
    assert expected in cell(changed, "install")["source"]
    back = renew_notebook.in_notebook(changed, None)
    assert back == renew_notebook.in_notebook(COMMITTED, None)
