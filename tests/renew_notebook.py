"""What the notebook and the README say of each other, and the notebook's outputs.

    python tests/renew_notebook.py            prints how it is opened, as the README says it
    python tests/renew_notebook.py --write    puts that into both, runs it, keeps its outputs

The badge and what is installed come from [project.urls] of pyproject.toml. The outputs are those of
a small model on the bundled play: short, and without anything of this machine.
"""

import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "finetune.ipynb"
BEGIN, END = "<!-- notebook -->\n", "<!-- /notebook -->\n"
DRIVE = 'home / "minigpt2"'  # the folder in which the notebook finds what it installs
SMALL = """\
data = ["sallow-point.txt"]
model = None
out = home / "runs" / "mine"
settings = {"preset": "nano", "max_steps": 200, "warmup_steps": 10, "device": "cpu", "workers": 1}
"""
OPEN = """\
[`notebooks/finetune.ipynb`](notebooks/finetune.ipynb) fine-tunes GPT-2 on your text in Google
Colab: put this repository's folder into your Google Drive as `minigpt2`, and open the notebook
there.
"""
OPEN_BY_BADGE = """\
{badge}
fine-tunes GPT-2 on your text in Google Colab.
"""


def repository(pyproject: str | None = None) -> str | None:
    """OWNER/NAME of the first address of GitHub in [project.urls], if there is one."""
    text = (ROOT / "pyproject.toml").read_text("utf-8") if pyproject is None else pyproject
    urls = re.search(r"^\[project\.urls\]\n(.*?)(?=^\[|\Z)", text, re.DOTALL | re.MULTILINE)
    found = re.search(r"https://github\.com/([\w.-]+/[\w.-]+)", urls[1] if urls else "")
    return found[1].removesuffix(".git") if found else None


def how_to_open(repository: str | None) -> str:
    """What the README and the notebook say of it."""
    if repository is None:
        return OPEN
    page = (
        f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/finetune.ipynb"
    )
    picture = "https://colab.research.google.com/assets/colab-badge.svg"
    return OPEN_BY_BADGE.format(badge=f"[![Open in Colab]({picture})]({page})")


def source(repository: str | None) -> str:
    """What is installed, as an expression of Python."""
    return DRIVE if repository is None else f'"git+https://github.com/{repository}"'


def in_readme(text: str, repository: str | None) -> str:
    """The README with how the notebook is opened."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"README.md lacks {BEGIN!r} or {END!r}"
    return before + BEGIN + how_to_open(repository) + END + after


def in_notebook(notebook: dict[str, Any], repository: str | None) -> dict[str, Any]:
    """The notebook with its first line and what it installs."""
    changed = json.loads(json.dumps(notebook))
    title, install = changed["cells"][0], cell(changed, "install")
    about = how_to_open(repository).replace("](notebooks/", "](").replace("`notebooks/", "`")
    title["source"] = lines(re.sub(r"(?s)(\n\n).*?(\n\n)", rf"\g<1>{about.strip()}\g<2>",
                                   "".join(title["source"]), count=1))  # fmt: skip
    text = "".join(install["source"])
    install["source"] = lines(re.sub(r"(?m)^source = .*$", f"source = {source(repository)}", text))
    return changed


def code(notebook: Any) -> list[Any]:
    """The cells of code."""
    return [c for c in notebook["cells"] if c["cell_type"] == "code"]


def cell(notebook: Any, tag: str) -> Any:
    """The cell that bears a tag."""
    (found,) = (c for c in notebook["cells"] if tag in c["metadata"].get("tags", ()))
    return found


def lines(text: str) -> list[str]:
    """Text as a notebook keeps it."""
    return text.splitlines(keepends=True)


def executed(
    notebook: dict[str, Any], folder: Path, parameters: str, *, without: tuple[str, ...] = ()
) -> Any:
    """The notebook after all of its cells were run in a kernel of its own, in a folder with the
    play; `without` are tags of cells that are left out.
    """
    import nbformat
    from nbclient import NotebookClient

    shutil.copy(ROOT / "data" / "sallow-point.txt", folder)
    own = json.loads(json.dumps(notebook))
    cell(own, "parameters")["source"] = lines(parameters)
    own["cells"] = [c for c in own["cells"] if not {*without} & {*c["metadata"].get("tags", ())}]
    made = nbformat.reads(json.dumps(own), as_version=4)
    nbformat.validate(made)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    surroundings = {"MINIGPT2_CACHE": str(folder / "cache"), "PYTHONPATH": os.pathsep.join(paths)}
    client = NotebookClient(made, timeout=240, coalesce_streams=True, kernel_name="python3",
                            resources={"metadata": {"path": str(folder)}})  # fmt: skip
    return client.execute(env={**os.environ, **surroundings})


def with_outputs(notebook: dict[str, Any], ran: Any) -> dict[str, Any]:
    """The notebook with what its cells gave, but for the report, which tells of the machine."""
    changed = json.loads(json.dumps(notebook))
    for number, (mine, theirs) in enumerate(zip(changed["cells"], ran["cells"])):
        mine["id"] = f"cell-{number}"
        if mine["cell_type"] == "code":
            mine["outputs"] = [kept(output) for output in theirs["outputs"]]
            mine["execution_count"] = theirs["execution_count"]
    return changed


def kept(output: Any) -> dict[str, Any]:
    """An output as it is committed."""
    found = json.loads(json.dumps(output))
    for kind, text in found.get("data", {}).items():
        text = re.sub(r"<details>.*</details>", "", "".join(text), flags=re.DOTALL)
        found["data"][kind] = lines(text.strip())
    if "text" in found:
        found["text"] = lines("".join(found["text"]))
    return found


def written(notebook: dict[str, Any]) -> str:
    """The notebook as a file."""
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Print how it is opened; with --write, renew what is committed."""
    address = repository()
    if sys.argv[1:] != ["--write"]:
        print(how_to_open(address), end="")
        return
    readme = ROOT / "README.md"
    readme.write_text(in_readme(readme.read_text("utf-8"), address), "utf-8")
    notebook = in_notebook(json.loads(NOTEBOOK.read_text("utf-8")), address)
    with tempfile.TemporaryDirectory() as folder:
        ran = executed(notebook, Path(folder), SMALL)
    NOTEBOOK.write_text(written(with_outputs(notebook, ran)), "utf-8")


if __name__ == "__main__":
    main()
