"""What a bug report needs to know of this machine, and of what is installed on it."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, requires, version
from re import match

import torch

from ... import __version__
from ...system.files import ASSETS
from ...system.processor import instruction_sets, processor_name

Facts = dict[str, str]


def machine() -> Facts:
    """The system, Python, torch, processor, GPU, packages and this program, each in a line."""
    n_threads = torch.get_num_threads()
    return {
        "minigpt2": _ours(),
        "system": platform.platform(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "torch": f"{torch.__version__} ({torch.backends.cpu.get_cpu_capability()})",
        "processor": f"{processor_name()}, {os.cpu_count()} cores, {n_threads} threads",
        "simd": " ".join(instruction_sets()) or "not told by this system",
        "gpu": _gpu(),
        "packages": ", ".join(_packages()),
    }


def _ours() -> str:
    """The version, and in a checkout the commit."""
    root = ASSETS.parents[1]
    if not (root / ".git").exists():
        return __version__
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return __version__
    commit = done.stdout.strip()
    return f"{__version__} ({commit})" if done.returncode == 0 and commit else __version__


def _gpu() -> str:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return f"{', '.join(names)} (CUDA {torch.version.cuda})"
    return "MPS" if torch.backends.mps.is_available() else "none"


def _packages() -> list[str]:
    """The packages that this one needs, with their versions, and those of its extras that are
    there.
    """
    try:
        needed = requires("minigpt2") or []
    except PackageNotFoundError:  # a checkout that was never installed
        needed = ["numpy", "safetensors", "tiktoken", "huggingface_hub", "tyro"]
    wanted = (line for line in needed if not line.endswith(('"test"', '"dev"')))
    names = (found[0] for line in wanted if (found := match(r"[\w.-]+", line)))
    return [
        f"{name} {known}"
        for name in dict.fromkeys(names)
        if name not in ("torch", "minigpt2") and (known := _version(name))
    ]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
