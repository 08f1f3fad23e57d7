"""The README's tree of files, made from the first sentence of each module's docstring.

python tests/tree.py            prints it
python tests/tree.py --write    puts it into README.md
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
LECTURES = ("model", "cache", "sampling", "generate", "tokenizer", "loss", "lora")
ROOMS = (
    "corpus",
    "training",
    "finetuning",
    "evaluation",
    "decoding",
    "explain",
    "formats",
    "hub",
    "runs",
    "system",
    "cli",
)
SENTENCE = re.compile(r"(.*?[^.])(?:\.(?: |$)|$)")
COLUMN = 25  # where the sentences begin
BEGIN, END = "<!-- tree -->\n```text\n", "```\n<!-- /tree -->\n"


def about(path: Path) -> str:
    """The first sentence of a module's docstring, without its full stop."""
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    found = SENTENCE.match(" ".join(text.split()))
    assert found, f"{path} has no docstring"
    return found[1]


def tree() -> str:
    """One line for each module: lectures first, then what they stand on, then the rooms."""
    package = ROOT / "minigpt2"
    others = sorted({path.stem for path in package.glob("*.py")} - {"__init__", *LECTURES})
    rows = [("minigpt2/", about(package / "__init__.py"))]
    rows += [(f"  {name}.py", about(package / f"{name}.py")) for name in (*LECTURES, *others)]
    for room in ROOMS:
        rows += _room(package / room, 2)
    return "".join(f"{name:<{COLUMN}} {text}\n" for name, text in rows)


def _room(folder: Path, indent: int) -> Iterator[tuple[str, str]]:
    yield f"{' ' * indent}{folder.name}/", about(folder / "__init__.py")
    for path in sorted(folder.glob("[!_]*.py")):
        yield f"{' ' * (indent + 2)}{path.name}", about(path)
    for inner in sorted(path.parent for path in folder.glob("*/__init__.py")):
        yield from _room(inner, indent + 2)


def in_readme(text: str) -> str:
    """The README with the tree as it is now."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"README.md lacks {BEGIN!r} or {END!r}"
    return before + BEGIN + tree() + END + after


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        readme = ROOT / "README.md"
        readme.write_text(in_readme(readme.read_text("utf-8")), "utf-8")
    else:
        print(tree(), end="")
