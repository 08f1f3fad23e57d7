"""The house has floors: a module imports only from lower ones, and each outside package has one
home.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# plain Python that every floor stands on
GROUND = {"errors", "sampling", "options", "files", "interrupt"}
FLOORS = [
    {"cache", "banned", "hub", "precision", "loss", "tokens", "split", "cleaning"}
    | {"duplicates", "pages", "prompts"},
    {"distributed", "sources"},
    {"encoding"},
    {"corpus"},
    {"tokenizer", "weights", "batches", "optim"},
    {"lora"},
    {"model"},
    {"speculative", "quantize", "graphs"},
    {"kernel"},
    {"generate", "evaluate", "checkpoint", "diagnose", "memory", "blocks", "plan", "packed"},
    {"training", "record", "survey", "loading"},
    {"progress"},
    {"card"},
    {"report"},
    {"console", "__init__"},
]
HOMES = {
    "tiktoken": {"tokenizer"},
    "huggingface_hub": {"hub"},
    "safetensors": {"weights"},
    "einops": {"model"},
    "filelock": {"files"},
    "pyarrow": {"sources"},
    "zstandard": {"sources"},
    "datasketch": {"duplicates"},
    "tyro": {"console"},
    "matplotlib": {"report"},
    "tqdm": {"progress"},
}


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """(modules of ours, outside packages) that a file imports, wherever the import stands, but for
    what a module does as a script: that is a script's, on top of the house.
    """
    ours, outside = set(), set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not is_script(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            ours |= (
                {node.module.split(".")[0]} if node.module else {name.name for name in node.names}
            )
        elif isinstance(node, ast.ImportFrom) and node.module:
            outside.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            outside |= {name.name.split(".")[0] for name in node.names}
    return ours, outside


def is_script(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


MODULES = sorted((ROOT / "minigpt2").glob("*.py"))


def floor_of(name: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if name in floor)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_imports_only_from_lower_floors(path):
    ours, _ = imports_of(path)
    ours -= {"__version__"}
    if path.stem in GROUND:
        assert ours <= {"errors", "sampling"} - {path.stem}
        return
    allowed = GROUND.union(*FLOORS[: floor_of(path.stem)])
    assert ours <= allowed, (
        f"{path.name} imports {sorted(ours - allowed)} from its own floor or above"
    )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_each_outside_package_has_one_home(path):
    _, outside = imports_of(path)
    for package, homes in HOMES.items():
        assert package not in outside or path.stem in homes, (
            f"{package} does not live in {path.name}"
        )


def test_no_pickle_exec_or_eval_anywhere():
    for path in [*MODULES, *ROOT.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"exec", "eval"}, f"{path.name}:{node.lineno}"
        assert "pickle" not in imports_of(path)[1], path.name
