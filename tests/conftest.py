"""Fixtures that several test files share."""

import os
import signal
import sys

import pytest

# The models are tiny: on a busy machine, threads that wait for each other made these tests seven
# times slower. Set before torch is imported, and for the scripts that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# files that take half a minute and more: at the end, one process would wait for the other
LONG = {
    "test_equivalences.py",
    "test_finetune.py",
    "test_fuzz_json.py",
    "test_golden.py",
    "test_gpu_check.py",
    "test_harness.py",
    "test_kill.py",
    "test_processes.py",
    "test_streams.py",
    "test_train.py",
}


def pytest_collection_modifyitems(items):
    """Refuse names that are not the same in every process that runs tests, begin with what takes
    longest, and skip what needs a GPU where there is none.
    """
    unnamed = [item.nodeid for item in items if " at 0x" in item.nodeid]
    assert not unnamed, f"give these cases names (ids=...): {unnamed}"
    items.sort(key=lambda item: item.path.name not in LONG)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def signal_handlers():
    """A test leaves the process's signal handlers as it found them: the next one raises signals."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.fixture
def drawn_pages():
    """Runs of this test draw their curves and reports, as users' runs do."""


@pytest.fixture(autouse=True)
def curves_where_they_are_looked_at(request, monkeypatch):
    """Other tests' runs, in this process, write their cards alone: drawing took two fifths of the
    time of those that train a few steps.
    """
    session = sys.modules.get("minigpt2.finetuning.session")
    if session and "drawn_pages" not in request.fixturenames:
        for name in ("draw_loss_curve", "write_report"):
            monkeypatch.setattr(session, name, lambda run: None)


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory):
    """A function from config values to the folder of a randomised Hugging Face model; built once,
    for reading only.
    """
    from hf_models import randomised  # takes seconds to import, and many test files do not need it

    folders = {}

    def folder(**values):
        key = tuple(sorted(values.items()))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("hf")
            randomised(**values).save_pretrained(folders[key])
        return folders[key]

    return folder


@pytest.fixture(scope="session")
def walked_folders(tmp_path_factory):
    """The models that ways to compute are compared on, as users have them: in folders."""
    import walk

    place = tmp_path_factory.mktemp("walk")
    made = {name: walk.write_folder(place / name, **values) for name, values in walk.FILES.items()}
    made["LoRA"] = walk.write_adapter(place / "LoRA", made["tied"])
    made["peft"] = walk.write_pefts_adapter(place / "peft", made["tied"])
    made["draft"] = walk.write_folder(place / "draft", n_layer=1, n_embd=14, block_size=23)
    return made
