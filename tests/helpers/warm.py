"""Starts the program in forks of a process that has imported torch already: a test that needs a
process of its own then waits for the program, not for a second and more of imports.

`python()` begins a command as `sys.executable` does. What it starts has the environment, folder,
streams, ignored signals and exit code of a Python that was started anew, ends with it and gets its
signals; a command that cannot be had so (other environment variables, no script) is started anew.
What it lacks is the end of Python's modules, 0.2 s with torch: it leaves before.
"""

import atexit
import gc
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

import warm_client

ROOT = Path(__file__).parents[2]
CLIENT = Path(__file__).with_name("warm_client.py")
STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


@cache
def python() -> list[str]:
    """The words that begin a command. The process that is forked is started by the first call, and
    ends with this one.
    """
    if not hasattr(os, "pidfd_open"):
        return [sys.executable]
    folder = tempfile.TemporaryDirectory(prefix="warm")
    address = str(Path(folder.name) / "socket")
    process = subprocess.Popen(
        [sys.executable, __file__, address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,  # a test's signals are the program's alone
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdout.readline()  # it listens
    atexit.register(folder.cleanup)
    atexit.register(process.wait)
    atexit.register(process.stdin.close)
    return [sys.executable, "-I", "-S", str(CLIENT), address]


def serve(address: str) -> dict:
    """Wait for commands until stdin ends; comes back in the fork that is to be one."""
    import minigpt2.cli.convert
    import minigpt2.cli.corpus
    import minigpt2.cli.evaluate
    import minigpt2.cli.explain
    import minigpt2.cli.report
    import minigpt2.cli.sample
    import minigpt2.cli.train
    import minigpt2.cli.verify
    import minigpt2.corpus.survey
    import minigpt2.decoding.drafters
    import minigpt2.decoding.ready
    import minigpt2.decoding.text
    import minigpt2.evaluation.kept_sums
    import minigpt2.explain.page
    import minigpt2.lora
    import minigpt2.runs.card
    import minigpt2.runs.page
    import minigpt2.training.build  # noqa: F401 - all that a command imports later

    gc.collect()
    gc.freeze()
    fixed = warm_client.fixed(dict(os.environ), str(ROOT))
    with Path(f"{address}.json").open("w") as file:
        json.dump({"root": str(ROOT), "environment": fixed}, file)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        print("listening", flush=True)
        while True:
            ready, _, _ = select.select([listener, 0], [], [])
            if 0 in ready:
                os._exit(0)
            client, _ = listener.accept()
            with client:
                if os.fork() == 0:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    listener.close()
                    return watched(client)


def watched(client: socket.socket) -> dict:
    """Fork once more: the new process comes back with its command, this one tells how it ends."""
    message, descriptors, _, _ = socket.recv_fds(client, 1 << 20, 3)
    while not message.endswith(b"\n"):
        message += client.recv(1 << 20)
    task = json.loads(message)
    child = os.fork()
    if child == 0:
        client.close()
        open_streams(dict(zip(task["streams"], descriptors)))
        return task
    for descriptor in descriptors:
        os.close(descriptor)
    client.sendall(b"%d\n" % child)
    ended = os.pidfd_open(child)
    if client in select.select([client, ended], [], [])[0]:  # the client was killed
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    with suppress(BrokenPipeError):
        client.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def open_streams(descriptors: dict[int, int]) -> None:
    """sys.stdin, stdout and stderr as Python makes them at its start."""
    for number, (name, mode) in enumerate(STREAMS):
        if number not in descriptors:
            os.close(number)
            stream = None
        else:
            os.dup2(descriptors[number], number)
            os.close(descriptors[number])
            old = getattr(sys, name)
            unbuffered = old.write_through  # PYTHONUNBUFFERED
            buffering = 0 if unbuffered else -1
            binary = open(number, mode + "b", buffering, closefd=False)  # noqa: SIM115
            (binary if unbuffered else binary.raw).name = f"<{name}>"
            stream = io.TextIOWrapper(
                binary,
                encoding=old.encoding,
                errors=old.errors,
                newline="\n",
                line_buffering=binary.isatty() or (name == "stderr" and not unbuffered),
                write_through=unbuffered,
            )
            stream.mode = mode
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def run(task: dict) -> None:
    """Be the program that the task names."""
    os.environ.clear()
    os.environ.update(task["environment"])
    os.chdir(task["folder"])
    for number in task["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    script, *arguments = task["argv"]
    sys.orig_argv = [sys.executable, script, *arguments]
    if script == "-m":
        module, *arguments = arguments
        sys.argv, sys.path[0] = ["-m", *arguments], task["folder"]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [script, *arguments], str(Path(script).parent)
        runpy.run_path(script, run_name="__main__")


def ended(task: dict) -> int:
    """Be the program, and end as Python does; the exit code."""
    code = 0
    try:
        run(task)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if not isinstance(stop.code, int | None):
            print(stop.code, file=sys.stderr)
    except BaseException as problem:
        code = -signal.SIGINT if isinstance(problem, KeyboardInterrupt) else 1
        sys.excepthook(*sys.exc_info())
    threading._shutdown()
    atexit._run_exitfuncs()
    return code if flushed() else 120


def flushed() -> bool:
    """Whether what is left of stdout and stderr could be written."""
    well = True
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except Exception as problem:
            well = False
            if stream is sys.stdout:
                what = f"{type(problem).__name__}: {problem}"
                print(f"Exception ignored in: {stream!r}\n{what}", file=sys.stderr)
    return well


if __name__ == "__main__":
    code = ended(serve(sys.argv[1]))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)  # without taking the modules down, 0.2 s with torch
