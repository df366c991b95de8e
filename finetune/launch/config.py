"""The launch group."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

STRATEGIES = ("single", "ddp", "fsdp")


@dataclass(kw_only=True, slots=True)
class LaunchConfig:
    """How many processes do the work, and what they share."""

    strategy: str
    """``single``: one process. ``ddp``: a whole model each. ``fsdp``: the base is cut into shards."""

    processes: int
    """Processes in all, one for each GPU."""

    offload: bool
    """``fsdp`` only: shards that are not in use wait in host memory."""

    def problems(self) -> Iterator[str]:
        if self.strategy not in STRATEGIES:
            yield f"launch.strategy must be one of {', '.join(STRATEGIES)}; got {self.strategy!r}"
        if self.processes < 1:
            yield f"launch.processes must be at least 1; got {self.processes}"
        if self.strategy == "single" and self.processes != 1:
            yield f"launch.processes must be 1 with launch=single; got {self.processes}: choose launch=ddp"
        if self.offload and self.strategy != "fsdp":
            yield f"launch.offload is for launch=fsdp; got strategy {self.strategy!r}"


def process_count() -> int:
    """Processes of this launch, as accelerate and torchrun tell them; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this process prints, writes and tracks."""
    return int(os.environ.get("RANK", "0")) == 0
