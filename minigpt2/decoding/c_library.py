"""C functions (assets/decode.c, assets/train.c): compiled once, privately, for this processor.

They are built with the machine's C compiler in a few seconds when they are first asked for, and
kept; where there is none, everything stays as it was.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..system.files import ASSETS, cache_folder, exposed, own_folder, replace_file

logger = logging.getLogger(__name__)

SOURCE, TRAINING = ASSETS / "decode.c", ASSETS / "train.c"
SHARED = ASSETS / "vectors.h"  # what they include
# -native: the functions are for this processor only
FLAGS = ["-O3", "-march=native", "-fopenmp", "-fPIC"]
FUNCTIONS = ("linear", "decode_step", "room_for", "has_half")
OF_TRAINING = ("normalize", "normalize_gradient", "gelu", "gelu_gradient", "drop")
OF_TRAINING += ("room_to_attend", "attend", "attend_gradient")
SECONDS = 60  # that a compiler may take


class _CompilerError(OSError):
    """The compiler says no."""


def find_compiler() -> str | None:
    """The machine's C compiler, if there is one that is known."""
    return shutil.which(os.environ.get("CC") or "cc") if os.name == "posix" else None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The C functions of decoding, built if need be; None, with a notice, where they cannot be
    had.
    """
    return _functions(SOURCE, FUNCTIONS)


@functools.cache
def training_library() -> ctypes.CDLL | None:
    """Those of training, as `library`."""
    return _functions(TRAINING, OF_TRAINING)


def _functions(source: Path, names: Sequence[str]) -> ctypes.CDLL | None:
    try:
        found = _library(source)
        if all(hasattr(found, name) for name in names):
            return found
        raise OSError("what was built lacks some of them")
    except (OSError, subprocess.SubprocessError) as problem:
        reason = next(iter(str(problem).splitlines()), type(problem).__name__)
        logger.warning("the C functions are not used (%s): going on without them", reason)
        return None


def _library(source: Path) -> ctypes.CDLL:
    """The functions for this source, compiler and processor, from the cache or made now.

    Whoever can write what is loaded here can do all that the user can. So what lies where others
    can write is not loaded: the library is built where only the user can write, and not kept.
    Raises OSError or SubprocessError.
    """
    compiler = find_compiler()
    if compiler is None:
        raise OSError("there is no C compiler: install one, such as gcc")
    texts = [source.read_text(), SHARED.read_text()]
    made_of = [*texts, *FLAGS, compiler, platform.platform(), _processor()]
    name = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    path = cache_folder("kernels") / f"{source.stem}-{name}.so"
    if (problem := _keep(path, compiler, source)) is None:
        return ctypes.CDLL(str(path.absolute()))
    logger.warning(
        "the C functions are built for this process alone (%s): set MINIGPT2_CACHE to a folder "
        "that only you can write to, and they are built once",
        problem,
    )
    with tempfile.TemporaryDirectory(prefix="minigpt2-") as folder:
        if problem := exposed(Path(folder)):
            raise OSError(f"{problem}: set TMPDIR to another folder")
        return ctypes.CDLL(str(_compile(compiler, Path(folder), source)))


def _keep(path: Path, compiler: str, source: Path) -> str | None:
    """See to it that the library is in the cache; why it cannot be kept or trusted there."""
    try:
        if problem := own_folder(path.parent):
            return problem
        if path.exists():
            if path.is_file() and (problem := exposed(path)) is None:
                return None
            logger.warning("%s: building the C functions anew", problem or f"{path} is no file")
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
            built = _compile(compiler, Path(folder), source)
            replace_file(path, lambda temporary: _copy(built, temporary), mode=0o600)
    except _CompilerError:
        raise
    except OSError as problem:
        return f"{path.parent}: {problem.strerror or problem}"
    return None


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _compile(compiler: str, folder: Path, source: Path) -> Path:
    """The library, built in a folder of the user's, its compiler's own temporary files as well."""
    object_file, library = folder / "built.o", folder / "built.so"
    include = f"-I{SHARED.parent}"
    _run([compiler, *FLAGS, include, "-c", str(source), "-o", str(object_file)], folder)
    # linked without an OpenMP of its own, it finds torch's, so that both share their threads
    _run([compiler, "-shared", str(object_file), "-o", str(library)], folder)
    library.chmod(0o600)
    return library


def _run(command: list[str], folder: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=SECONDS, env=environment
    )
    if done.returncode:
        said = " ".join(done.stderr.split())[:200] or f"exit code {done.returncode}"
        raise _CompilerError(f"{command[0]} failed: {said}")


def _processor() -> str:
    """What the processor can do: a cache may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
