"""Stands where a command's Python stands: hands what it was given to a process of warm.py and ends
as that ends. Imports little, to begin at once.
"""

import fcntl
import json
import os
import signal
import socket
import sys

FORWARDED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}
# the program reads these when it runs; of others nobody knows that they are not read at an import
FREE = {"MINIGPT2_CACHE", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
# neither of them is the program's
FREE |= {"PYTEST_CURRENT_TEST", "PWD", "OLDPWD", "SHLVL", "_", "COLUMNS", "LINES"}


def fixed(environment: dict, root: str) -> dict:
    """What of an environment must be that of the process which is forked."""
    kept = {name: value for name, value in environment.items() if name not in FREE}
    if kept.get("PYTHONPATH") == root:
        del kept["PYTHONPATH"]
    return kept


def main(address: str, argv: list[str]) -> int:
    with open(f"{address}.json") as file:  # noqa: PTH123 - pathlib is slow to import
        server = json.load(file)
    environment = dict(os.environ)
    script = argv and (argv[0] == "-m" or argv[0].endswith(".py"))
    if not script or fixed(environment, server["root"]) != server["environment"]:
        os.execv(sys.executable, [sys.executable, *argv])
    streams = [n for n, stream in enumerate((sys.stdin, sys.stdout, sys.stderr)) if stream]
    ignored = [n for n in FORWARDED if signal.getsignal(n) == signal.SIG_IGN]
    task = {
        "argv": argv,
        "environment": environment,
        "folder": os.getcwd(),  # noqa: PTH109
        "ignored": ignored,
        "streams": streams,
    }
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # until there is somebody to send them to
    with socket.socket(socket.AF_UNIX) as low:  # 0 where stdin is closed
        connection = socket.socket(fileno=fcntl.fcntl(low.fileno(), fcntl.F_DUPFD_CLOEXEC, 3))
    connection.connect(address)
    message = json.dumps(task).encode() + b"\n"
    sent = socket.send_fds(connection, [message], streams)
    connection.sendall(message[sent:])
    answers = connection.makefile()
    child = int(answers.readline())
    for number in FORWARDED.difference(ignored):
        signal.signal(number, lambda number, frame: os.kill(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):  # a pipe has the other process alone at its end
        os.dup2(nothing, number)
    return int(answers.readline())


if __name__ == "__main__":
    code = main(sys.argv[1], sys.argv[2:])
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)
