"""Looks at the machine without touching torch, so that `plan` stays quick."""

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

CPU_FEATURES = ("avx512f", "avx512_bf16", "amx_bf16")
DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclass(kw_only=True, slots=True)
class HardwareConfig:
    """The machine to run on, or to plan for."""

    name: str
    """``auto`` looks at this machine; any other option names one to plan for."""

    device: str = "auto"
    """``auto`` takes a GPU where there is one; ``cpu``, ``cuda`` or ``mps`` insist."""

    threads: int = 0
    """CPU threads for torch; 0 takes the cores that this process may use."""

    gpus: int = 0
    """How many GPUs a named machine has."""

    gpu_name: str = ""
    """What the maker calls it."""

    gpu_memory_bytes: int = 0
    """Memory of each GPU."""

    gpu_capability: str = ""
    """CUDA compute capability, e.g. ``8.6``; bfloat16 needs 8.0."""

    ram_bytes: int = 0
    """Host memory of a named machine; 0 where it is not known."""

    def problems(self) -> Iterator[str]:
        if self.device not in DEVICES:
            yield f"hardware.device must be one of {', '.join(DEVICES)}; got {self.device!r}"
        if self.threads < 0:
            yield f"hardware.threads must be 0 (all cores) or more; got {self.threads}"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU, as its driver describes it."""

    name: str
    memory_bytes: int
    capability: str

    @property
    def has_bfloat16(self) -> bool:
        """Ampere (8.0) and later compute in bfloat16. Source: CUDA C programming guide, arithmetic instructions."""
        return tuple(int(part) for part in self.capability.split(".")) >= (8, 0)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run can use."""

    cores: int
    ram_bytes: int
    disk_free_bytes: int
    gpus: tuple[Gpu, ...] = ()
    features: tuple[str, ...] = ()
    system: str = field(default_factory=platform.system)
    metal: bool = False


def probe(config: HardwareConfig | None = None) -> Machine:
    """This machine, or the one that `hardware=<name>` describes."""
    if config is not None and config.name != "auto":
        return named(config)
    return Machine(
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        ram_bytes=_ram_bytes(),
        disk_free_bytes=shutil.disk_usage(Path.cwd()).free,
        gpus=_nvidia_gpus(),
        features=_cpu_features(),
        metal=platform.system() == "Darwin" and platform.machine() == "arm64",
    )


def named(config: HardwareConfig) -> Machine:
    """A machine that is only described: its disk is taken as this one's."""
    gpu = Gpu(name=config.gpu_name, memory_bytes=config.gpu_memory_bytes, capability=config.gpu_capability)
    return Machine(
        cores=os.cpu_count() or 1,
        ram_bytes=config.ram_bytes,
        disk_free_bytes=shutil.disk_usage(Path.cwd()).free,
        gpus=(gpu,) * config.gpus,
    )


def _ram_bytes() -> int:
    """Physical memory, or less where a container's limit is tighter."""
    limit = Path("/sys/fs/cgroup/memory.max")
    total = int(psutil.virtual_memory().total)
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        return min(total, int(text))
    return total


def _nvidia_gpus() -> tuple[Gpu, ...]:
    if shutil.which("nvidia-smi") is None:
        return ()
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return ()
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines() if line.strip()]
    gpus = tuple(
        Gpu(name=name, memory_bytes=int(mebibytes) * 1024**2, capability=capability)
        for name, mebibytes, capability in rows
    )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return gpus
    chosen = [int(part) for part in visible.split(",") if part.strip().isdigit()]
    return tuple(gpus[index] for index in chosen if index < len(gpus))


def _cpu_features() -> tuple[str, ...]:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return ()
    flags = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "").split()
    return tuple(feature for feature in CPU_FEATURES if feature in flags)
