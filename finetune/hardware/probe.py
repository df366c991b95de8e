"""Describes the machine without importing torch, so that `plan` stays quick."""

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from finetune.hardware.gpus import Gpu, find_gpus
from finetune.memory import memory_group

CPU_FEATURES = ("avx512f", "avx512_bf16", "amx_bf16")
DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclass(kw_only=True, slots=True)
class HardwareConfig:
    """Selects the machine to run on, or to plan for."""

    name: str
    """``auto`` probes this machine; any other option names one to plan for."""

    device: str = "auto"
    """``auto`` takes a GPU if there is one; ``cpu``, ``cuda`` and ``mps`` fail where the device is missing."""

    threads: int = 0
    """CPU threads for torch; 0 means as many as the cores that this process may use."""

    gpus: int = 0
    """Number of GPUs of a named machine."""

    gpu_name: str = ""
    """The GPU's product name."""

    gpu_memory_bytes: int = 0
    """Memory of each GPU, in bytes."""

    gpu_capability: str = ""
    """CUDA compute capability, for example ``8.6``; bfloat16 needs 8.0."""

    ram_bytes: int = 0
    """Host memory of a named machine, in bytes; 0 where it is not known."""

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yields the settings that have no effect given the others, each with the reason."""
        if self.name == "auto":
            names = ("gpus", "gpu_name", "gpu_memory_bytes", "gpu_capability", "ram_bytes")
            yield from ((name, "it describes a machine to plan for") for name in names)

    def problems(self) -> Iterator[str]:
        """Yields one sentence for each invalid setting."""
        if self.device not in DEVICES:
            yield f"hardware.device must be one of {', '.join(DEVICES)}; got {self.device!r}"
        if self.threads < 0:
            yield f"hardware.threads must be 0 (all cores) or more; got {self.threads}"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run can use.

    Attributes:
        cores: CPU cores that this process may use.
        ram_bytes: Host memory, within a container's limit; 0 where it is not known.
        disk_free_bytes: Free space in the working directory's file system.
        gpus: NVIDIA GPUs that this process may use.
        driver: Version of NVIDIA's driver; empty where there is none.
        gpu_obstacle: Why GPUs that are here cannot be used; empty where none are, or all can.
        features: Those of `CPU_FEATURES` that the CPU has.
        processor: Instruction set architecture, as `platform.machine` names it.
        system: Operating system, as `platform.system` names it.
        metal: Whether there is an Apple GPU.
    """

    cores: int
    ram_bytes: int
    disk_free_bytes: int
    gpus: tuple[Gpu, ...] = ()
    driver: str = ""
    gpu_obstacle: str = ""
    features: tuple[str, ...] = ()
    processor: str = field(default_factory=platform.machine)
    system: str = field(default_factory=platform.system)
    metal: bool = False


def probe(config: HardwareConfig | None = None) -> Machine:
    """Returns this machine, or the one that `hardware=<name>` describes."""
    if config is not None and config.name != "auto":
        return named(config)
    found = find_gpus()
    return Machine(
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        ram_bytes=_ram_bytes(),
        disk_free_bytes=shutil.disk_usage(Path.cwd()).free,
        gpus=found.gpus,
        driver=found.driver,
        gpu_obstacle=found.obstacle,
        features=_cpu_features(),
        metal=platform.system() == "Darwin" and platform.machine() == "arm64",
    )


def named(config: HardwareConfig) -> Machine:
    """Returns a machine that is only described; its CPU and disk are taken as this machine's."""
    gpu = Gpu(name=config.gpu_name, memory_bytes=config.gpu_memory_bytes, capability=config.gpu_capability)
    return Machine(
        cores=os.cpu_count() or 1,
        ram_bytes=config.ram_bytes,
        disk_free_bytes=shutil.disk_usage(Path.cwd()).free,
        gpus=(gpu,) * config.gpus,
        features=_cpu_features(),
    )


def _ram_bytes() -> int:
    """Returns the physical memory, or a container's limit where that is smaller."""
    total, group = int(psutil.virtual_memory().total), memory_group()
    return total if group is None else min(total, group.limit_bytes)


def _cpu_features() -> tuple[str, ...]:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return ()
    flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "").split()
    return tuple(feature for feature in CPU_FEATURES if feature in flags)
