"""Runs train.py again and again in forked processes, so that torch is imported once.

Reads lines of JSON, {"argv": [...], "log": path}; for each it writes the process's number and, when
that has ended, its exit code (negative: the signal).
"""

import json
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import minigpt2.finetuning.session
import minigpt2.lora
import minigpt2.runs.card
import minigpt2.runs.page
import minigpt2.training.build  # noqa: F401 - what the children need is imported before they are made
from minigpt2.cli import train


def run(argv, log):
    """The child: train, and leave without the driver's own endings."""
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        code = train.run(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    for line in sys.stdin:
        task = json.loads(line)
        pid = os.fork()
        if pid == 0:
            run(task["argv"], task["log"])
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
