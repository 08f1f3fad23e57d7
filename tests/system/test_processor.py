"""The processor's name and instruction sets, by what Linux writes of processors."""

import platform

import pytest

from minigpt2.system import processor

XEON = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R)  Processor @ 2.50GHz
flags\t\t: fpu sse2 fma avx f16c avx2 avx512f avx512_vnni amx_int8 avx512_4vnniw
bugs\t\t: spectre_v1 avx_vnni

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
GRAVITON = """processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd aes asimddp sve i8mm bf16
CPU implementer\t: 0x41
"""


@pytest.fixture
def says(monkeypatch, tmp_path):
    def put(text):
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")

    return put


def test_a_processor_of_intels_says_its_name_and_what_it_multiplies_with(says):
    says(XEON)
    assert processor.processor_name() == "Intel(R) Xeon(R) Processor @ 2.50GHz"
    assert processor.instruction_sets() == (
        ["avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "amx_int8"]
    )


def test_a_processor_of_arms_has_no_name_but_its_instruction_sets(says, monkeypatch):
    says(GRAVITON)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert processor.processor_name() == "aarch64"
    assert processor.instruction_sets() == ["asimd", "bf16", "asimddp", "i8mm", "sve"]


def test_where_the_system_does_not_tell_nothing_is_made_up(monkeypatch, tmp_path):
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "none")
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    assert (processor.processor_name(), processor.instruction_sets()) == ("arm", [])
