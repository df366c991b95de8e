"""Limits of what data files and chat templates may take, so that a damaged or hostile one ends with a message."""

from collections.abc import Iterator
from dataclasses import dataclass

SMALLEST_LINE_BYTES = 2**20
"""Files are read in blocks of this size."""


@dataclass(kw_only=True, slots=True)
class LimitConfig:
    """Limits of what data files and chat templates may take. No limit changes a row."""

    line_bytes: int = 2**28
    """Longest line of a JSON Lines, CSV or text file, cell, and element of a JSON array, in bytes."""

    compression_ratio: float = 100.0
    """Largest size of a decompressed file, relative to its size; of files that have at least 64 MiB then."""

    template_seconds: float = 10.0
    """Processor time that the chat template may take for one conversation."""

    template_characters: int = 10_000_000
    """Longest text that the chat template may add to one conversation. It may take 100 bytes of memory for each."""

    def problems(self) -> Iterator[str]:
        """Yields each limit that would refuse everything."""
        if self.line_bytes < SMALLEST_LINE_BYTES:
            yield f"data.limits.line_bytes must be at least {SMALLEST_LINE_BYTES}; got {self.line_bytes}"
        for name, least in (("compression_ratio", 1), ("template_seconds", 0.1), ("template_characters", 10_000)):
            if getattr(self, name) < least:
                yield f"data.limits.{name} must be at least {least}; got {getattr(self, name)}"


LIMITS = LimitConfig()
