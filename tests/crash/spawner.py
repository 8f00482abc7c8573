"""A process that has imported all of cachefs, and forks to run one command of it: a start costs what the command does.

Over the socket on descriptor 3 come lines {"words", "environment", "output"}; back go lines [pid, None] when a command has
been started, [pid, exit status] when one has ended. Run as a program: `python spawner.py`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys

import cachefs.cli
import cachefs.cli.mount
import cachefs.mount  # what `cachefs mount` imports late


def be_the_command(words: list[str], environment: dict[str, str], output: str) -> None:
    """Becomes what `cachefs WORDS` is; leaves by os._exit."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.closerange(3, 64)
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.environ.clear()
    os.environ.update(environment)
    status = 1
    try:
        status = cachefs.cli.run(cachefs.cli.commands, words)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def reap(channel: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        channel.sendall(json.dumps([pid, os.waitstatus_to_exitcode(status)]).encode() + b"\n")


def main() -> None:
    channel = socket.socket(fileno=3)
    woken, waking = os.pipe()
    os.set_blocking(waking, False)
    signal.set_wakeup_fd(waking)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    requests = channel.makefile("rb", buffering=0)
    while True:
        ready, _, _ = select.select([channel, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            reap(channel)
        if channel in ready:
            line = requests.readline()
            if not line:
                return
            request = json.loads(line)
            pid = os.fork()
            if pid == 0:
                be_the_command(request["words"], request["environment"], request["output"])
            channel.sendall(json.dumps([pid, None]).encode() + b"\n")


if __name__ == "__main__":
    main()
