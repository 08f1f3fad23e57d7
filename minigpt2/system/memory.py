"""What memory this machine has: how much of it may be taken, and how much was. Knows devices,
control groups and limits, nothing of what the memory is for.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None

# How much of what is there may be filled. The rest is for what no forecast knows: on a GPU gaps
# between tensors and the code of the kernels; on the CPU other programs, and the system does not
# refuse memory to a process that has grown too large but ends it.
SHARE = {"cpu": 0.8, "cuda": 0.9, "mps": 0.7}
# glibc's malloc.h: after how much free memory at the end of the heap that is given back, from which
# size on pieces are mapped by themselves, which are given back whole, and how many of these may be
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
KEPT = {MMAP_MAX: 0, TRIM_THRESHOLD: -1}
# as many by default, and the sizes to which glibc raises its own once large tensors were freed
GIVEN_BACK = {MMAP_MAX: 65_536, MMAP_THRESHOLD: 32 * 2**20, TRIM_THRESHOLD: 64 * 2**20}
SHARE_OF_ALL = 0.5  # where the system says what it has, and not what is left of it
ASSUMED = 8 * 2**30  # where it says neither

# of control groups' versions: where they are, and the files and the field that say what is left
GROUP_FILES = {
    1: (
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
    2: ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
}


def memory_budget(device: torch.device, n_processes: int = 1) -> int:
    """The bytes that a forecast may fill: a safe share of what is available and of what this
    process has already; where the system does not say what is available, a share of all, or
    ASSUMED.

    `n_processes` of a run share the CPU; each has a GPU of its own.
    """
    if device.type != "cpu":
        n_processes = 1
    free = available_memory(device)
    if free is None:
        total = _physical()
        return (ASSUMED if total is None else int(SHARE_OF_ALL * total)) // n_processes
    return int(SHARE[device.type] * (free / n_processes + _held(device)))


def available_memory(device: torch.device) -> int | None:
    """The bytes that this process may still take of a device, None where the system does not say.

    On Linux's CPU that is what the machine has left, or what the limits of containers leave of it.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return _linux_available(Path("/"))


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has taken so far: on CUDA tensors alone, on the CPU all that is
    resident; 0 where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()  # it gives nothing back unless it is told to
    if resource is None:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


@contextlib.contextmanager
def memory_kept() -> Iterator[None]:
    """Inside, the CPU memory of tensors that are gone stays with the process for those that come;
    afterwards what is free is given back.

    Otherwise large tensors take new pages from the system each time, which it fills with zeros one
    by one: a training step of 124M asks for 130,000 pages. For glibc, whose malloc torch uses on
    Linux; elsewhere nothing changes.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(library, "mallopt"):
        yield
        return
    assert library is not None
    try:
        for what, value in KEPT.items():
            library.mallopt(what, value)
        yield
    finally:
        for what, value in GIVEN_BACK.items():
            library.mallopt(what, value)
        library.malloc_trim(0)


def _held(device: torch.device) -> int:
    """The bytes that this process has now, counted as `peak_memory` does."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    try:
        n_pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return n_pages * os.sysconf("SC_PAGE_SIZE")


def _physical() -> int | None:
    """The bytes of memory that the machine has in all, None where the system does not say."""
    try:
        n_pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
    return n_pages * size if n_pages > 0 else None


def _linux_available(root: Path) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kib = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    if kib is None:
        return None
    return max(0, min([1024 * int(kib), *_left_in_groups(root)]))


def _left_in_groups(root: Path) -> list[int]:
    """What the limits of this process's control groups leave, which containers are made of.

    The folder named in /proc may be that of the machine, and the container's is then what is seen
    at the top; so all folders on the way are asked.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        version = 1 if "memory" in controllers.split(",") else 2 if not controllers else 0
        if version:
            top, *names = GROUP_FILES[version]
            places = [Path(path.lstrip("/")), *Path(path.lstrip("/")).parents]
            left += [_left_in_group(root / top / place, *names) for place in places]
    return [n_bytes for n_bytes in left if n_bytes is not None]


def _left_in_group(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    """A group's limit less what it uses, where files that the system may forget do not count."""
    try:
        most, used = ((folder / name).read_text().strip() for name in (limit, usage))
        pairs = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    return None if most == "max" else int(most) - int(used) + int(pairs.get(reclaimable, 0))
