"""Detects that another process of the launch is gone, without waiting for a message that never arrives."""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from finetune.console import print_error
from finetune.errors import RankFailed

if TYPE_CHECKING:
    from torch.distributed import Store

    from finetune.launch.ranks import Ranks

BEAT_SECONDS = 1.0
EXIT_WAIT_SECONDS = 5.0
"""How long a failed process waits for the first one to print its message, and how long the others may take to end."""

FAILURE, ACKNOWLEDGED = "failure", "acknowledged"
LOST_CONNECTION = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Application timeout caused pair closure",
    "gloo/transport",
)
"""What gloo's errors contain when another process is gone. Source: gloo's transport/tcp/pair.cc."""


class Heartbeat:
    """Sends a heartbeat and notices when others stop, in threads of its own.

    Time is counted in heartbeats of this process, not by the clock, so that a suspended machine can be resumed.
    """

    def __init__(self, ranks: Ranks, store: Store, *, timeout_seconds: int) -> None:
        self.ranks, self.store, self.timeout_seconds = ranks, store, timeout_seconds
        self.watched = range(1, ranks.count) if ranks.is_main else range(1)
        self.last_seen = dict.fromkeys(self.watched, (b"", 0))
        self.beats = 0

    def start(self) -> None:
        for task in (self.send, self.monitor):
            threading.Thread(target=task, daemon=True).start()

    def monitor(self) -> None:
        """Ends this process if `send` hangs: after a network failure, a store request may block for many minutes."""
        before, hanging = 0, 0
        while not self.ranks.leaving.wait(BEAT_SECONDS):
            hanging = hanging + 1 if self.beats == before else 0
            before = self.beats
            if hanging * BEAT_SECONDS >= self.timeout_seconds and not self.ranks.failure:
                self._end(RankFailed(f"machine 0 has not answered for {self.timeout_seconds} s", exit_code=1))

    def send(self) -> None:
        """Sends heartbeats until this process leaves or another one has failed."""
        while not self.ranks.leaving.wait(BEAT_SECONDS):
            self.beats += 1
            try:
                self.store.set(f"alive/{self.ranks.rank}", str(self.beats))
                failure = self._reported_failure() or self._silent_rank()
            except RuntimeError as error:  # all of torch's store errors are RuntimeErrors
                failure = RankFailed(f"machine 0 cannot be reached any more ({first_line(error)})", exit_code=1)
            if failure and not self.ranks.leaving.is_set():
                self._end(failure)
                return

    def _reported_failure(self) -> RankFailed | None:
        if not self.store.check([FAILURE]):
            return None
        report = json.loads(self.store.get(FAILURE))
        if report["rank"] == self.ranks.rank:
            return None
        message = f"process {report['rank']} on {report['host']} failed, so all end: {report['message']}"
        return RankFailed(message, exit_code=report["code"])

    def _silent_rank(self) -> RankFailed | None:
        for rank in self.watched:
            key = f"alive/{rank}"
            now = self.store.get(key) if self.store.check([key]) else b""
            before, beats = self.last_seen[rank]
            self.last_seen[rank] = (now, beats + 1 if now == before else 0)
            if beats * BEAT_SECONDS >= self.timeout_seconds and now:
                return RankFailed(
                    f"process {rank} has sent no heartbeat for {self.timeout_seconds} s: it was killed, or its machine "
                    f"or the network is down; see the end of logs/rank-{rank}.log, and continue from the last "
                    "checkpoint with run.if_exists=resume",
                    exit_code=1,
                )
        return None

    def _end(self, failure: RankFailed) -> None:
        """Gives the main thread time to notice the failure, then ends the process: it may hang in a collective call."""
        self.ranks.failure = failure
        with suppress(RuntimeError):  # the store is gone, and with it whoever waits for the acknowledgement
            if self.ranks.is_main:
                self.store.set(ACKNOWLEDGED, "1")
        time.sleep(EXIT_WAIT_SECONDS)
        if not self.ranks.leaving.is_set() and not self.ranks.failing:
            os._exit(print_error(failure, failure.exit_code))


def is_lost_connection(error: BaseException) -> bool:
    """Returns whether an error means that another process of the group, or the store, is gone."""
    from torch.distributed import DistError

    if isinstance(error, DistError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in LOST_CONNECTION)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, cut at 160 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
