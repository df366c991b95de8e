"""The launch group."""

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass

from finetune.errors import ConfigError

STRATEGIES = ("single", "ddp", "fsdp", "deepspeed")

SHARDABLE = ("none", "nf4", "fp4")
"""``quantization.method`` whose weights can be sharded: one tensor of codes, and constants that stay whole. int8 keeps
its scales with the codes and changes the layout of both in its first pass."""


@dataclass(kw_only=True, slots=True)
class LaunchConfig:
    """Selects how many processes train, and what they share."""

    strategy: str
    """``single``: one process. ``ddp``: a whole model each. ``fsdp``, ``deepspeed``: the base is sharded."""

    processes: int
    """Number of processes in total, one for each GPU."""

    offload: bool
    """``fsdp`` and ``deepspeed``: shards that are not in use are kept in host memory."""

    nodes: int = 1
    """Number of machines; each runs the same number of processes. They share the disk of ``run.root``."""

    node: int = 0
    """Index of this machine. Machine 0 prepares the data, and continues alone after training."""

    host: str = "127.0.0.1"
    """Address of machine 0, as the others reach it."""

    port: int = 29500
    """A free port of machine 0. With a single machine, another one is taken where it is in use."""

    heartbeat_timeout_seconds: int = 30
    """A process that sends no heartbeat for so long is considered dead, and all others end with a message."""

    grace_seconds: int = 300
    """Time after a signal to finish a step and write a checkpoint before the processes are killed."""

    def problems(self) -> Iterator[str]:
        if self.strategy not in STRATEGIES:
            yield f"launch.strategy must be one of {', '.join(STRATEGIES)}; got {self.strategy!r}"
        for key in ("processes", "nodes", "port", "heartbeat_timeout_seconds", "grace_seconds"):
            if getattr(self, key) < 1:
                yield f"launch.{key} must be at least 1; got {getattr(self, key)}"
        if self.strategy == "single" and self.processes != 1:
            yield f"launch.processes must be 1 with launch=single; got {self.processes}: choose launch=ddp"
        if self.strategy != "single" and self.processes == 1:
            yield (
                f"launch={self.strategy} with launch.processes=1 has nothing to share; choose launch=single, "
                "or launch.processes=2 or more"
            )
        if self.offload and self.strategy not in ("fsdp", "deepspeed"):
            yield f"launch.offload is for launch=fsdp and launch=deepspeed; got strategy {self.strategy!r}"
        if self.nodes >= 1 and self.processes % self.nodes:
            yield f"launch.processes={self.processes} must be a multiple of launch.nodes={self.nodes}"
        if not 0 <= self.node < max(self.nodes, 1):
            yield f"launch.node must be 0 to {self.nodes - 1}, different on each machine; got {self.node}"
        if self.nodes > 1 and self.host in ("127.0.0.1", "localhost"):
            yield f"launch.host must be the address of machine 0, as the others reach it; got {self.host}"


def process_count() -> int:
    """Returns the number of processes of this launch, from the environment of accelerate or torchrun; 1 without
    them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Returns whether this process prints, writes and tracks."""
    return int(os.environ.get("RANK", "0")) == 0


def as_launched(config: LaunchConfig) -> LaunchConfig:
    """Returns the group as the launcher started this process: ``torchrun -m finetune`` needs no ``launch=``.

    Raises:
        ConfigError: The group and the launcher contradict each other.
    """
    count, strategy = process_count(), _launcher_strategy()
    if strategy != "ddp" and config.strategy not in ("single", strategy):
        raise ConfigError(
            f"launch={config.strategy} contradicts the launcher, which is configured for {strategy}; use one of them"
        )
    if count == 1 or (config.strategy != "single" and config.processes == count):
        return config
    if config.strategy == "single":
        offload = strategy == "fsdp" and os.environ.get("FSDP_OFFLOAD_PARAMS") == "true"
        return dataclasses.replace(config, strategy=strategy, processes=count, offload=offload)
    raise ConfigError(
        f"launch.processes={config.processes}, but the launcher started {count}; use the same number in both"
    )


def _launcher_strategy() -> str:
    """Reads the strategy from accelerate's variables, and removes them: accelerate would wrap the model a second
    time."""
    variables = {name: os.environ.pop(f"ACCELERATE_USE_{name.upper()}", "false") for name in ("fsdp", "deepspeed")}
    return next((name for name, value in variables.items() if value == "true"), "ddp")
