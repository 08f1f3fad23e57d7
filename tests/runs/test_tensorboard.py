"""TensorBoard shows what metrics.jsonl holds."""

import subprocess
import sys

import pytest

from minigpt2.errors import InputError
from minigpt2.runs.record import Metrics, Sample
from minigpt2.runs.tensorboard import TensorBoardLog
from run_records import LINES, metrics_of


def logged_scalars(folder):
    """From a name to (step, value) pairs, as TensorBoard itself reads them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), purge_orphaned_data=True)
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


def test_tensorboard_shows_the_numbers_of_metrics(tmp_path):
    pytest.importorskip("tensorboard")
    log = TensorBoardLog(tmp_path)
    skipped = {"step": 3, "loss": 5.0, "grad_norm": None, "skipped": True, "newer": 2.5}
    for metrics in metrics_of([*LINES, skipped]):
        log(metrics)
    log.sample(Sample(2, "Once", " upon"))
    log.close()
    assert logged_scalars(tmp_path) == {
        "loss": [(1, pytest.approx(6.8)), (2, 6.0), (3, 5.0)],
        "val_loss": [(0, pytest.approx(6.9)), (2, pytest.approx(6.1))],
        "newer": [(3, 2.5)],
    }
    assert b"Once upon" in next(tmp_path.glob("events*")).read_bytes()


def test_a_resumed_run_replaces_what_tensorboard_showed_of_the_steps_it_repeats(tmp_path):
    pytest.importorskip("tensorboard")
    for done, steps, loss in ((0, range(1, 6), 1.0), (3, range(4, 8), 2.0)):
        log = TensorBoardLog(tmp_path, done)
        for step in steps:
            log(Metrics(step, loss))
        log.close()
    expected = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0), (7, 2.0)]
    assert logged_scalars(tmp_path)["loss"] == expected


def test_a_missing_tensorboard_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        TensorBoardLog(tmp_path)


def test_tensorboard_is_written_to_without_matplotlib():
    check = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import minigpt2.runs.tensorboard\n"
        "try:\n    import minigpt2.runs.curves\n"
        "except ImportError:\n    print('only curves need it')"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "only curves need it"
