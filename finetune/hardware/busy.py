"""What other programs leave of the processors, looked at before torch starts its threads."""

import os

from finetune.console import say

BUSY_PERCENT = 30
LOOK_SECONDS = 0.2
SPINS = "20000"
"""Rounds that a waiting thread spins before it sleeps. Beside one busy program, OpenMP's default (300,000) made training more
than ten times slower; on a quiet machine this number costs an eighth of the speed."""


def spare_others() -> None:
    """Lets waiting threads sleep early where other programs need the processors. OpenMP reads it when torch is imported."""
    import psutil

    share = psutil.cpu_percent(interval=LOOK_SECONDS)
    if share > BUSY_PERCENT and "GOMP_SPINCOUNT" not in os.environ:
        os.environ["GOMP_SPINCOUNT"] = SPINS
        say("hardware", f"waiting threads sleep early, because other programs use {share:.0f} % of the processors")
