"""What other programs leave of the processors, looked at before torch starts its threads."""

import os
from dataclasses import dataclass

from finetune.console import log

BUSY_PERCENT = 30
SPINS = "20000"
"""Rounds that a waiting thread spins before it sleeps. Beside one busy program, OpenMP's default (300,000) made training more
than ten times slower; on a quiet machine this number costs an eighth of the speed."""


@dataclass(frozen=True, slots=True)
class Look:
    """Seconds of all processors since they were started: what others have used, and all there were."""

    others: float
    all: float

    @classmethod
    def now(cls) -> "Look":
        import psutil

        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        own = os.times()
        busy = (
            sum(times) - idle - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        )  # these are part of user and nice
        return cls(others=busy - own.user - own.system, all=busy + idle)


def yield_to_busy_cpu(since: Look) -> None:
    """Lets waiting threads sleep early where other programs need the processors. OpenMP reads it when torch is imported.

    Args:
        since: From the program's start; what composing and checking the configuration takes is long enough to look.
    """
    now = Look.now()
    share = 100 * (now.others - since.others) / max(now.all - since.all, 1e-9)
    if share > BUSY_PERCENT and "GOMP_SPINCOUNT" not in os.environ:
        os.environ["GOMP_SPINCOUNT"] = SPINS
        log("hardware", f"waiting threads sleep early, because other programs use {share:.0f} % of the processors")
