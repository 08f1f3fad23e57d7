"""The processor of this machine: its name, and what decides how fast it multiplies."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# as Linux names them: for numbers of 32 and 16 bits, then for those of 8, then in blocks
X86 = "avx avx2 fma f16c avx512f avx512bw avx512_fp16 avx512_bf16 avx512_vnni avx_vnni"
X86 += " amx_tile amx_bf16 amx_int8"
ARM = "asimd asimdhp asimdfhm bf16 asimddp i8mm sve sve2 sme"


def processor_name() -> str:
    """Its name as its maker writes it, where the system tells; otherwise its kind."""
    name = _field("model name") or platform.processor() or platform.machine()
    return " ".join(name.split())


def instruction_sets() -> list[str]:
    """Those for products of matrices that the processor has, as Linux names them; none where the
    system does not tell.
    """
    found = _field("flags", "Features").split()
    return [name for name in f"{X86} {ARM}".split() if name in found]


def _field(*names: str) -> str:
    """What /proc/cpuinfo says of the first core under the first of the names; "" without it."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in fields if name.strip() in names), "")
