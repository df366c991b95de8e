"""The launch group."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

STRATEGIES = ("single", "ddp", "fsdp", "deepspeed")

SHARDABLE = ("none", "nf4", "fp4")
"""``quantization.method`` whose weights can be cut: one tensor of codes, and constants that stay whole. int8 keeps its scales with
the codes and lays both out anew in its first pass."""


@dataclass(kw_only=True, slots=True)
class LaunchConfig:
    """How many processes do the work, and what they share."""

    strategy: str
    """``single``: one process. ``ddp``: a whole model each. ``fsdp``, ``deepspeed``: the base is cut into shards."""

    processes: int
    """Processes in all, one for each GPU."""

    offload: bool
    """``fsdp`` and ``deepspeed``: shards that are not in use wait in host memory."""

    nodes: int = 1
    """Machines, each with as many of the processes; they share the disk of ``run.root``."""

    node: int = 0
    """Which of them this is, 0 for the first, which prepares the data and goes on alone after training."""

    host: str = "127.0.0.1"
    """Address of the first machine, as the others reach it."""

    port: int = 29500
    """Free port there; with one machine, another is taken where it is in use."""

    silence_seconds: int = 30
    """A process that is not heard of for so long is given up, and all end with a message. Each says every second that it lives."""

    grace_seconds: int = 300
    """After a signal, time to finish a step and to write a checkpoint before the processes are killed."""

    def problems(self) -> Iterator[str]:
        if self.strategy not in STRATEGIES:
            yield f"launch.strategy must be one of {', '.join(STRATEGIES)}; got {self.strategy!r}"
        for key in ("processes", "nodes", "port", "silence_seconds", "grace_seconds"):
            if getattr(self, key) < 1:
                yield f"launch.{key} must be at least 1; got {getattr(self, key)}"
        if self.strategy == "single" and self.processes != 1:
            yield f"launch.processes must be 1 with launch=single; got {self.processes}: choose launch=ddp"
        if self.strategy != "single" and self.processes == 1:
            yield f"launch={self.strategy} with launch.processes=1 shares nothing; choose launch=single, or launch.processes=2 or more"
        if self.offload and self.strategy not in ("fsdp", "deepspeed"):
            yield f"launch.offload is for launch=fsdp and launch=deepspeed; got strategy {self.strategy!r}"
        if self.nodes >= 1 and self.processes % self.nodes:
            yield f"launch.processes={self.processes} cannot be dealt evenly to launch.nodes={self.nodes}; give a multiple"
        if not 0 <= self.node < max(self.nodes, 1):
            yield f"launch.node must be 0 to {self.nodes - 1}, another on each machine; got {self.node}"
        if self.nodes > 1 and self.host in ("127.0.0.1", "localhost"):
            yield f"launch.host must be the first machine's address, as the others reach it; got {self.host}"


def process_count() -> int:
    """Processes of this launch, as accelerate and torchrun tell them; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this process prints, writes and tracks."""
    return int(os.environ.get("RANK", "0")) == 0


def as_launched(config: LaunchConfig) -> LaunchConfig:
    """The same, as the launcher that started this process has it: ``torchrun -m finetune`` needs no ``launch=``."""
    import dataclasses

    from finetune.errors import ConfigError

    count, told = process_count(), _told()
    if told != "ddp" and config.strategy not in ("single", told):
        raise ConfigError(
            f"launch={config.strategy}, and the configuration of the launcher that started this says {told}; give the same"
        )
    if count == 1 or (config.strategy != "single" and config.processes == count):
        return config
    if config.strategy == "single":
        offload = told == "fsdp" and os.environ.get("FSDP_OFFLOAD_PARAMS") == "true"
        return dataclasses.replace(config, strategy=told, processes=count, offload=offload)
    raise ConfigError(
        f"launch.processes={config.processes}, and the launcher that started this has made {count}; give the same number"
    )


def _told() -> str:
    """What accelerate's configuration asks for. Its plugins are taken off: each would wrap the model in its own way."""
    asked = {name: os.environ.pop(f"ACCELERATE_USE_{name.upper()}", "false") for name in ("fsdp", "deepspeed")}
    return next((name for name, said in asked.items() if said == "true"), "ddp")
