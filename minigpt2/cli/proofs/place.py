"""A folder with the models and the text that proofs need, each made when it is first asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ...evaluation.figures import FOLDER
from . import walk

LINES = 120


class Place:
    """Models as users have them, in folders below one that is thrown away afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "cache"  # for commands: of texts that are not the user's

    def model(self, name: str) -> Path:
        """The folder of a model of the walk's FILES, or of "draft", "LoRA" or "peft"."""
        made = {"draft": write_draft, "LoRA": self._lora, "peft": self._peft}
        files = {file: partial(walk.write_folder, **values) for file, values in walk.FILES.items()}
        return self._made(name, {**files, **made}[name])

    def text(self) -> Path:
        """A text to train on."""

        def write(path: Path) -> None:
            lines = (f"Lamp {n} of {n * n % 97} burns by the water.\n" for n in range(LINES))
            path.write_text("".join(lines), "utf-8")

        return self._made("text.txt", write)

    def _lora(self, folder: Path) -> None:
        walk.write_adapter(folder, self.model("tied"))

    def _peft(self, folder: Path) -> None:
        """The committed adapter, which names its base by a path."""
        shutil.copytree(FOLDER / "peft", folder)
        config = folder / "adapter_config.json"
        values = json.loads(config.read_text("utf-8"))
        base = {"base_model_name_or_path": str(self.model("tied"))}
        config.write_text(json.dumps({**values, **base}, allow_nan=False), "utf-8")

    def _made(self, name: str, write: Callable[[Path], object]) -> Path:
        path = self.folder / name
        if not path.exists():
            write(path)
        return path


def write_draft(folder: Path) -> None:
    """A smaller model with the same tokens."""
    walk.write_folder(folder, n_layer=1, n_embd=14, block_size=23)
