"""Measures what other programs use of the CPU, before torch starts its threads."""

import os
from dataclasses import dataclass

from finetune.console import log

BUSY_PERCENT = 30
SPIN_COUNT = "20000"
"""Rounds that a waiting thread spins before it sleeps. Next to one busy program, OpenMP's default (300,000) made
training more than ten times slower; on a quiet machine this value costs an eighth of the speed. Both were measured on
two cores with AMX."""


@dataclass(frozen=True, slots=True)
class CpuUsage:
    """CPU seconds of all cores since boot: what other programs used, and how many there were."""

    others: float
    all: float

    @classmethod
    def now(cls) -> "CpuUsage":
        """Reads the counters."""
        import psutil

        times = psutil.cpu_times()
        process = os.times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # also counted in user and nice
        busy = sum(times) - idle - guests
        return cls(others=busy - process.user - process.system, all=busy + idle)


def yield_to_busy_cpu(since: CpuUsage) -> None:
    """Lets waiting threads sleep early where other programs need the CPU.

    OpenMP reads the setting when torch is imported.

    Args:
        since: Usage at the program's start; composing and checking the configuration takes long enough to measure.
    """
    now = CpuUsage.now()
    share = 100 * (now.others - since.others) / max(now.all - since.all, 1e-9)
    if share > BUSY_PERCENT and "GOMP_SPINCOUNT" not in os.environ:
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
        log("hardware", f"waiting threads sleep early, because other programs use {share:.0f} % of the CPU")
