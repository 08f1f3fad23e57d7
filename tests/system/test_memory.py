"""What memory the machine has: free, held, limited by containers, or not said."""

import mmap
import resource
import sys

import pytest
import torch

from minigpt2.system import memory

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MACHINE = {"proc/meminfo": "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 5000 kB\n"}
V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"


def group_v1(folder, limit, used, forgettable=0):
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{used}\n",
        f"{folder}/memory.stat": f"inactive_file 7\ntotal_inactive_file {forgettable}\n",
    }


def group_v2(folder, limit, used, forgettable=0):
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon 7\ninactive_file {forgettable}\n",
    }


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({}, 5000 * 1024),
        ({"proc/self/cgroup": "0::/a/b\n"}, 5000 * 1024),
        # version 2: the group itself, the one above it, none, a container that sees only itself
        ({"proc/self/cgroup": "0::/a/b\n"} | group_v2(f"{V2}/a/b", 900, 500, 60), 460),
        ({"proc/self/cgroup": "0::/a/b\n"} | group_v2(f"{V2}/a", 900, 500), 400),
        ({"proc/self/cgroup": "0::/a/b\n"} | group_v2(f"{V2}/a/b", "max", 500), 5000 * 1024),
        ({"proc/self/cgroup": "0::/\n"} | group_v2(V2, 900, 500, 60), 460),
        ({"proc/self/cgroup": "0::/../b\n"} | group_v2(V2, 900, 500, 60), 460),
        (
            {"proc/self/cgroup": "0::/a/b\n"}
            | group_v2(f"{V2}/a/b", 900, 500)
            | group_v2(f"{V2}/a", 700, 650),
            50,
        ),
        # version 1
        (
            {"proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/c\n0::/\n"}
            | group_v1(f"{V1}/c", 900, 500, 60),
            460,
        ),
        ({"proc/self/cgroup": "4:memory:/docker/1f\n"} | group_v1(V1, 900, 500, 60), 460),
        ({"proc/self/cgroup": "4:memory:/c\n"} | group_v1(f"{V1}/c", 2**63 - 4096, 500), 5120000),
        ({"proc/self/cgroup": "4:memory:/c\n"} | group_v1(f"{V1}/c", 900, 950), 0),
    ],
)
def test_the_machine_and_every_limit_of_a_container_are_asked(tmp_path, groups, expected):
    assert memory._linux_available(write(tmp_path, MACHINE | groups)) == expected


def test_a_machine_that_does_not_say_what_it_has_is_not_guessed_at(tmp_path, monkeypatch):
    assert memory._linux_available(tmp_path) is None
    assert memory._linux_available(write(tmp_path, {"proc/meminfo": "MemTotal: 9 kB"})) is None
    monkeypatch.setattr(memory, "available_memory", lambda device: None)
    monkeypatch.delattr(memory.os, "sysconf")  # as on Windows
    assert memory.memory_budget(CPU) == memory.ASSUMED
    assert memory.memory_budget(CPU, n_processes=2) == memory.ASSUMED // 2


@pytest.mark.parametrize("answer", [ValueError("unrecognized configuration name"), -1])
def test_where_only_the_memory_in_all_is_known_half_of_it_may_be_taken(monkeypatch, answer):
    monkeypatch.setattr(memory, "available_memory", lambda device: None)
    sizes = {"SC_PHYS_PAGES": 3_000_017, "SC_PAGE_SIZE": 16_384}  # as on a Mac of 48 GB
    monkeypatch.setattr(memory.os, "sysconf", sizes.__getitem__, raising=False)
    assert memory.memory_budget(CPU) == 3_000_017 * 8192
    assert memory.memory_budget(CPU, n_processes=3) == 3_000_017 * 8192 // 3

    def unknown(name):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(memory.os, "sysconf", unknown)
    assert memory.memory_budget(CPU) == memory.ASSUMED


def test_the_budget_is_a_share_of_what_is_free_and_what_is_held(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: 1000)
    monkeypatch.setattr(memory, "_held", lambda device: 200)
    assert memory.memory_budget(CPU) == 960
    assert memory.memory_budget(CPU, n_processes=4) == 360
    assert memory.memory_budget(CUDA) == 1080


def pages_of_a_tensor():
    """How many pages the system gives this process for a tensor of 64 MiB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="for glibc")
def test_memory_that_is_kept_is_taken_again_and_given_back_in_the_end():
    with memory.memory_kept():
        torch.ones(2**25)
        assert pages_of_a_tensor() < 1000
        held = memory._held(CPU)
    assert memory._held(CPU) < held - 2**25
    # pages of 4 KiB, or huge ones of 2 MiB
    assert pages_of_a_tensor() >= 2**26 // 2**21


def test_where_malloc_is_another_nothing_changes(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    with memory.memory_kept():
        torch.ones(3)
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    monkeypatch.setattr(memory.ctypes, "CDLL", None)  # is not asked
    with memory.memory_kept():
        torch.ones(3)


@pytest.mark.skipif(sys.platform != "linux", reason="reads what is held from /proc")
def test_the_peak_rises_with_what_is_taken_and_stays():
    held = memory._held(CPU)
    before = memory.peak_memory(CPU)
    assert 0 < held <= before + 2**22  # the kernel counts some pages later
    size = max(0, before - held) + 2**27
    with mmap.mmap(-1, size) as taken:  # not a tensor: the heap may have room for it already
        taken.write(b"x" * size)
        assert memory._held(CPU) >= held + 2**26
        after = memory.peak_memory(CPU)
        assert after >= before + 2**26
    assert memory.peak_memory(CPU) >= after
