"""Limits the processor time and the memory of what others wrote, a chat template say, within this process.

Example::

    with limited(seconds=10, memory_bytes=2**30):
        text = template.render(messages=messages)
"""

import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from types import FrameType

from finetune.console import human_bytes

TIMER, SIGNAL = signal.ITIMER_PROF, signal.SIGPROF
"""They count the time of the processor: a process that waits, or is stopped, does not come nearer to its limit."""

PAGE_BYTES = resource.getpagesize()


class LimitExceeded(Exception):
    """What ran needs more than it may take; the message is that limit."""


class _Expired(BaseException):
    """Ends what runs. It does not derive from Exception, because Jinja's compiler continues after those."""


@contextmanager
def limited(*, seconds: float, memory_bytes: int) -> Iterator[None]:
    """Ends what takes too long or too much memory.

    Signals reach the main thread alone, so in other threads nothing is limited; memory is limited on Linux. One call
    into C that looks for no signal is ended by its memory only.

    Args:
        seconds: Of the processor.
        memory_bytes: In addition to what the process has.

    Raises:
        LimitExceeded: It did.

    Source: Jinja's documentation of its sandbox leaves both limits to the operating system.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _handle_signal()
    before = _limit_memory(memory_bytes)
    try:
        signal.setitimer(TIMER, seconds, seconds)
        try:
            yield
        finally:
            signal.setitimer(TIMER, 0)
            resource.setrlimit(resource.RLIMIT_AS, before)
    except _Expired as error:
        raise LimitExceeded(f"{seconds:g} s of processor time") from error
    except MemoryError as error:
        raise LimitExceeded(f"{human_bytes(memory_bytes)} of memory") from error


@cache
def _handle_signal() -> None:
    signal.signal(SIGNAL, _expire)


def _expire(number: int, frame: FrameType | None) -> None:
    raise _Expired


def _limit_memory(more_bytes: int) -> tuple[int, int]:
    """Limits what this process may map in addition to what it has; returns the limits that it had."""
    before = soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        limit = int(os.pread(_sizes(os.getpid()), 32, 0).split(maxsplit=1)[0]) * PAGE_BYTES + more_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit if soft == resource.RLIM_INFINITY else min(soft, limit), hard))
    return before


@lru_cache(maxsize=1)
def _sizes(process: int) -> int:
    """Opens the sizes of this process, for all later calls: opening takes longer than reading."""
    return os.open(f"/proc/{process}/statm", os.O_RDONLY)
