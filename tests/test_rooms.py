"""The house has rooms: a module imports only from lower floors, rooms know each other in no circle,
and each outside package has one home.
"""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minigpt2"
ORDER = (
    "errors equivalences < arguments < loss < system < cache sampling < hub < formats < "
    "tokenizer runs < lora model corpus < generate < evaluation < decoding < training < "
    "finetuning < explain < cli"
)
FLOORS = [floor.split() for floor in ORDER.split(" < ")]
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}
LECTURES = {"model", "cache", "sampling", "generate", "tokenizer", "loss", "lora"}
NOT_IN_LECTURES = {"hub", "cli", "runs", "corpus", "training"}
MODULES = sorted(PACKAGE.rglob("*.py"))
HOMES = {
    "tiktoken": {"tokenizer"},
    "regex": {"tokenizer"},
    "huggingface_hub": {"hub/client", "hub/patience", "hub/remote", "hub/download"},
    "safetensors": {"formats/tensors"},
    "einops": {"model"},
    "jinja2": {"formats/chat"},
    "filelock": {"system/files"},
    "lxml": {"corpus/sources/html_text"},
    "pyarrow": {"corpus/sources/rows"},
    "zstandard": {"corpus/sources/files"},
    "mammoth": {"corpus/sources/papers"},
    "striprtf": {"corpus/sources/papers"},
    "pypdf": {"corpus/sources/papers"},
    "datasketch": {"corpus/near_duplicates"},
    "tokenizers": {"corpus/vocabulary"},
    "tyro": {"cli/console", "cli/completion"},
    "matplotlib": {"runs/curves"},
    "tensorboard": {"runs/tensorboard"},
    "tqdm": {"cli/progress", "finetuning/progress"},
}


def name_of(path: Path) -> str:
    """A module as a path below the package: "model", "corpus/survey"."""
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def room_of(path: Path) -> str:
    """The folder, or the module's own name at the top; every `__main__` is cli's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "cli" if parts[-1] == "__main__" else parts[0]


def imported(path: Path, text: str) -> Iterator[tuple[str, ...]]:
    """What a module imports, wherever the import stands, each as the parts of its absolute name."""
    home = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (tuple(name.name.split(".")) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = home[: len(home) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            yield from ((*base, name.name) for name in node.names)
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                anchor = home if first.value.startswith(".") else ()
                yield (*anchor, *first.value.strip(".").split("."))


def rooms_used(path: Path, text: str | None = None) -> set[str]:
    """The rooms, and modules at the top, that a module imports from; not its own."""
    found = imported(path, path.read_text("utf-8") if text is None else text)
    ours = {parts[1] for parts in found if parts[0] == "minigpt2" and len(parts) > 1}
    return ours - {"__version__", room_of(path)}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_only_from_lower_floors(path):
    room = room_of(path)
    if room == "__init__":
        return  # exports names of all
    for used in rooms_used(path):
        assert FLOOR_OF[used] < FLOOR_OF[room], f"{name_of(path)} imports {used}"


@pytest.mark.parametrize(
    "line",
    [
        "from ..training import loop",
        "from ..training.loop import fit",
        "import minigpt2.training.loop",
        "from minigpt2.training.loop import fit",
        "from minigpt2 import training",
        "def f():\n    from .. import training",
        "import_module('minigpt2.training')",
        "if TYPE_CHECKING:\n    from ..training.loop import Job",
        "import os, minigpt2.training as t",
    ],
)
def test_every_kind_of_import_is_seen(line):
    assert rooms_used(PACKAGE / "corpus" / "survey.py", line) == {"training"}


def test_every_file_is_seen_and_has_its_floor():
    seen = {room_of(path) for path in MODULES} - {"__init__"}
    assert seen == set(FLOOR_OF)
    assert len(MODULES) > 60
    files = {path for path in PACKAGE.rglob("*") if path.suffix == ".py"}
    assert files == set(MODULES)
    inits = {path.parent for path in PACKAGE.rglob("__init__.py")}
    assert {path.parent for path in MODULES} == inits


def needed() -> dict[str, set[str]]:
    """From each module to those that it imports, wherever the imports stand."""
    names = {name_of(path).removesuffix("/__init__"): path for path in MODULES}
    needs = {}
    for name, path in names.items():
        if name == "__init__":
            continue
        found = {
            "/".join(parts[1:end])
            for parts in imported(path, path.read_text("utf-8"))
            for end in (len(parts), len(parts) - 1)
            if parts[0] == "minigpt2"
        }
        needs[name] = (found & names.keys()) - {name, ""}
    return needs


def test_no_circle_of_modules():
    needs = needed()
    assert sum(map(len, needs.values())) > 150
    TopologicalSorter(needs).prepare()  # raises CycleError


@pytest.mark.parametrize(
    ("command", "draws"), [("cli/sample", False), ("cli/convert", False), ("cli/train", True)]
)
def test_only_who_draws_curves_needs_matplotlib(command, draws):
    needs, reached, waiting = needed(), set(), {command}
    while waiting:
        reached |= waiting
        waiting = {name for module in waiting for name in needs[module]} - reached
    assert len(reached) > 10
    assert ("runs/curves" in reached) == draws


@pytest.mark.parametrize("name", sorted(LECTURES))
def test_a_lecture_knows_no_network_no_command_line_and_no_files_of_others(name):
    assert rooms_used(PACKAGE / f"{name}.py").isdisjoint(NOT_IN_LECTURES)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_each_outside_package_has_one_home(path):
    outside = {parts[0] for parts in imported(path, path.read_text("utf-8"))}
    for package, homes in HOMES.items():
        assert package not in outside or name_of(path) in homes, (
            f"{package} does not live in {name_of(path)}"
        )


def test_no_pickle_exec_or_eval_anywhere():
    for path in [*MODULES, *ROOT.glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"exec", "eval"}, f"{path.name}:{node.lineno}"
        assert "pickle" not in {parts[0] for parts in imported(path, text)}, path.name


def test_the_readme_tells_this_order():
    assert ORDER in " ".join((ROOT / "README.md").read_text("utf-8").split())


def test_files_that_comments_name_are_there():
    # of ours by name; these are of other projects or of a run
    others = {"encoder.py", "runtime.py", "convert_hf_to_gguf.py"}
    there = {path.name for path in [*MODULES, *ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")]}
    for path in MODULES:
        named = set(re.findall(r"\b[a-z]\w*\.py\b", path.read_text("utf-8")))
        assert named <= there | others, path
