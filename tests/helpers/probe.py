"""Writes down what its process has been given, and ends in the way that its first word names."""

import json
import os
import signal
import sys
import time
from pathlib import Path

STREAMS = ("stdin", "stdout", "stderr", "__stdin__", "__stdout__", "__stderr__")
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGCHLD)


def stream(found):
    if found is None:
        return None
    ways = found.line_buffering, found.write_through, found.isatty()
    return [found.encoding, found.errors, found.fileno(), found.mode, *ways]


def is_open(descriptor):
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def facts():
    return {
        "argv": sys.argv,
        "orig_argv": sys.orig_argv,
        "path": sys.path[0],
        "folder": str(Path.cwd()),
        "environment": dict(os.environ),
        "streams": [stream(getattr(sys, name)) for name in STREAMS],
        "handlers": [str(signal.getsignal(number)) for number in NUMBERS],
        "masked": list(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))),
        "open": [number for number in range(20) if is_open(number)],
        "main": sys.modules["__main__"].__file__,
    }


def end(how):
    if how == "raise":
        raise ValueError("a bug")
    if how == "exit 7":
        sys.exit(7)
    if how == "exit text":
        sys.exit("a text")
    if how == "leave":
        os._exit(3)
    if how == "abort":
        os.abort()
    if how == "wait":
        time.sleep(60)


if __name__ == "__main__":
    how, record = sys.argv[1:]
    found = json.dumps(facts())
    Path(f"{record}.new").write_text(found)
    Path(f"{record}.new").replace(record)
    if sys.stdout:
        print("a result")
    if sys.stdin:
        print(f"read: {sys.stdin.read()}", file=sys.stderr)
    end(how)
