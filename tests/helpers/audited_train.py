"""train.py, ended before its first step if a part of the model was swapped without a note."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from audit import unregistered, unregistered_wrapper
from minigpt2.cli import train
from minigpt2.cli.console import leave
from minigpt2.training import loop as training

fit = training.fit


def audited(job, **options):
    found = unregistered(job.model, job.model.config) + unregistered_wrapper(job.scorer)
    if found:
        sys.exit(f"without a note: {'; '.join(found)}")
    return fit(job, **options)


if __name__ == "__main__":
    training.fit = audited
    leave(train.run())
