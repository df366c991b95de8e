"""Judges one program: runs its tests here and the program in a process of its own, both without permissions.

`finetune.eval.sandbox` runs this folder under ``python -I``. It imports nothing of the package. The program can neither
write to this process nor to its report: it answers the questions of the tests over a socket, and nothing else.
"""

import json
import os
import signal
import socket
import sys
import time
from typing import NoReturn

import answer
import questions
import restrict

SECONDS_TO_END = 0.2
"""How long the program's process may take to end once the tests have; it is killed afterwards."""


def main() -> None:
    """Reads ``{"program", "tests", "limits"}`` from stdin and writes ``{"outcome", "reason"}`` to stdout."""
    del sys.path[0]  # this folder
    ours, theirs = socket.socketpair()
    program = os.fork()  # before anything is read: the program's process never has the tests
    if not program:
        ours.close()
        _run_program(theirs)
    theirs.close()
    request = json.loads(sys.stdin.buffer.read())
    report = os.dup(1)
    _silence()
    try:
        restrict.restrict(request["limits"])
    except restrict.Unrestricted as error:
        result = {"outcome": "refused", "reason": str(error)}
    else:
        reason = questions.run_tests(ours, request)
        ours.close()
        result = {"outcome": "failed" if reason else "passed", "reason": reason}
        if reason == questions.ENDED:
            result = _explain(_status(program), result)
        else:
            _status(program, seconds=SECONDS_TO_END)
    os.write(report, json.dumps(result).encode())
    os._exit(0)


def _run_program(connection: socket.socket) -> NoReturn:
    _silence()
    try:
        answer.serve(connection)
    finally:
        os._exit(0)


def _silence() -> None:
    for stream in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)


def _status(process: int, seconds: float | None = None) -> int:
    """Waits for the end of a process and returns the signal that ended it, or 0."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(process, 0 if deadline is None else os.WNOHANG)
        if ended or (deadline is not None and time.monotonic() > deadline):
            return os.WTERMSIG(status) if ended and os.WIFSIGNALED(status) else 0
        time.sleep(0.002)


def _explain(ended_by: int, result: dict[str, str]) -> dict[str, str]:
    if ended_by == signal.SIGXCPU:
        return {"outcome": "timed out", "reason": "computed"}
    return result | ({"reason": f"ended by {signal.Signals(ended_by).name}"} if ended_by else {})


if __name__ == "__main__":
    main()
