"""Takes calibration text from a run's own training rows: sequences of one length, in a seeded order.

calibration = calibration_sequences(Path("outputs/mine/data/train"), rows=32, tokens=256, seed=1)
problem = calibration.shortage  # empty where they are enough
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

FEWEST = 8
"""Sequences below which the statistics of activations are noise: one batch of auto-round."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Token ids to calibrate on.

    Attributes:
        sequences: Each of the same length.
        total: Tokens that were read for them; more may exist where there are enough sequences.
        rows: Sequences asked for.
        tokens: Of each.
    """

    sequences: list[list[int]]
    total: int
    rows: int
    tokens: int

    @property
    def shortage(self) -> str:
        """Explains why the training rows are too few or too short to calibrate on; empty where they are enough."""
        needed = min(FEWEST, self.rows)
        if len(self.sequences) >= needed:
            return ""
        longest = self.total // needed
        return (
            f"calibration takes at least {needed} sequences of calibration_tokens={self.tokens}, and the training rows "
            f"hold {self.total:,} tokens, which make {len(self.sequences)}; set calibration_tokens to at most "
            f"{longest}, or give more rows"
        )


def calibration_sequences(folder: Path, *, rows: int, tokens: int, seed: int) -> Calibration:
    """Reads rows in a seeded order, one after the other, and cuts them into sequences without padding.

    Args:
        folder: The prepared split, e.g. ``data/train``.
        rows: Sequences, at most.
        tokens: Of each sequence.
        seed: Of the order.
    """
    from datasets import load_from_disk

    split = load_from_disk(str(folder))
    order = list(range(len(split)))
    random.Random(seed).shuffle(order)
    stream: list[int] = []
    for number in order:
        if len(stream) >= rows * tokens:
            break
        row = split[number]
        stream += row["input_ids"] if "input_ids" in row else row["prompt_ids"]
    sequences = [stream[start : start + tokens] for start in range(0, len(stream) - tokens + 1, tokens)]
    return Calibration(sequences=sequences[:rows], total=len(stream), rows=rows, tokens=tokens)
