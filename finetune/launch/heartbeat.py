"""How a process notices that another one of its launch is gone, without waiting for a message that never comes."""

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
LAST_WORD_SECONDS = 5.0
"""How long a failed process stays so that the first one can pass its message on, and how long the others try to end in order."""

FAILURE, HEARD = "failure", "heard"
LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Application timeout caused pair closure",
    "gloo/transport",
)
"""How gloo says that another process is gone. Source: gloo's transport/tcp/pair.cc."""


class Pulse:
    """Says that this process lives, and notices when another does not, in threads of its own.

    Silence is counted in its own beats, not by the clock: a machine that was asleep wakes up with all its processes.
    """

    def __init__(self, ranks: Ranks, store: Store, *, silence_seconds: int) -> None:
        self.ranks, self.store, self.silence_seconds = ranks, store, silence_seconds
        self.watched = range(1, ranks.count) if ranks.is_main else range(1)
        self.seen = dict.fromkeys(self.watched, (b"", 0))
        self.beats = 0

    def start(self) -> None:
        for task in (self.beat, self.watch):
            threading.Thread(target=task, daemon=True).start()

    def watch(self) -> None:
        """Notices a beat that hangs: where the network is cut, a question to the store waits for its answer for many minutes."""
        before, hanging = 0, 0
        while not self.ranks.leaving.wait(BEAT_SECONDS):
            hanging = hanging + 1 if self.beats == before else 0
            before = self.beats
            if hanging * BEAT_SECONDS >= self.silence_seconds and not self.ranks.failure:
                self._end(
                    RankFailed(
                        f"the machine of the first process has not answered for {self.silence_seconds} s", code=1
                    )
                )

    def beat(self) -> None:
        while not self.ranks.leaving.wait(BEAT_SECONDS):
            self.beats += 1
            try:
                self.store.set(f"alive/{self.ranks.rank}", str(self.beats))
                failure = self._said() or self._silent()
            except RuntimeError as error:  # torch's store errors are all of this kind
                failure = RankFailed(
                    f"the machine of the first process cannot be reached any more ({short(error)})", code=1
                )
            if failure and not self.ranks.leaving.is_set():
                self._end(failure)
                return

    def _said(self) -> RankFailed | None:
        if not self.store.check([FAILURE]):
            return None
        who = json.loads(self.store.get(FAILURE))
        if who["rank"] == self.ranks.rank:
            return None
        return RankFailed(
            f"process {who['rank']} on {who['host']} failed, and all end with it: {who['message']}", code=who["code"]
        )

    def _silent(self) -> RankFailed | None:
        for rank in self.watched:
            key = f"alive/{rank}"
            now = self.store.get(key) if self.store.check([key]) else b""
            before, beats = self.seen[rank]
            self.seen[rank] = (now, beats + 1 if now == before else 0)
            if beats * BEAT_SECONDS >= self.silence_seconds and now:
                return RankFailed(
                    f"process {rank} has not been heard of for {self.silence_seconds} s: it was killed, or its machine or the network is "
                    f"down; logs/rank-{rank}.log has its last words, and run.if_exists=resume goes on from the last checkpoint",
                    code=1,
                )
        return None

    def _end(self, failure: RankFailed) -> None:
        """Lets the main thread find out by itself, and ends the process where it cannot: it may hang in a message to the dead."""
        self.ranks.failure = failure
        with suppress(RuntimeError):  # the store is gone: nobody waits for an answer
            if self.ranks.is_main:
                self.store.set(HEARD, "1")
        time.sleep(LAST_WORD_SECONDS)
        if not self.ranks.leaving.is_set() and not self.ranks.failing:
            os._exit(print_error(failure, failure.code))


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error means that another process of the group, or the store, is gone."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in LOST)
    )


def short(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
