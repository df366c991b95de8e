"""Finds the GPUs of a machine without torch: NVIDIA's through NVML, and AMD's names."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

KFD = Path("/sys/class/kfd/kfd/topology/nodes")
"""Where Linux lists the devices that ROCm computes on. Source: the kernel's drivers/gpu/drm/amd/amdkfd."""

ROCM = "ROCm is not supported: none of the quantization methods was run on it, and AMD GPUs are not planned for"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU, or one MIG instance of a GPU, as its driver describes it.

    Attributes:
        name: Product name.
        memory_bytes: Its memory; the host's where both share one.
        capability: CUDA compute capability, for example ``8.6``.
        uuid: How CUDA_VISIBLE_DEVICES names it; empty where the driver does not say.
        free_bytes: Memory that no program uses at the moment; 0 where it is not known.
    """

    name: str
    memory_bytes: int
    capability: str
    uuid: str = ""
    free_bytes: int = 0

    @property
    def has_bfloat16(self) -> bool:
        """Tells whether it computes in bfloat16, as Ampere (8.0) and later do. Source: CUDA C programming guide."""
        return self.has_capability("8.0")

    def has_capability(self, needed: str) -> bool:
        """Tells whether its CUDA compute capability is at least the one that is needed, e.g. ``8.0``."""
        own, least = (tuple(int(part) for part in text.split(".")) for text in (self.capability, needed))
        return own >= least


@dataclass(frozen=True, kw_only=True)
class Card:
    """One card: itself, or its MIG instances, of which a process uses one at a time."""

    uuid: str
    gpus: tuple[Gpu, ...]
    has_mig: bool


@dataclass(frozen=True, kw_only=True)
class GpuSearch:
    """What was found.

    Attributes:
        gpus: NVIDIA GPUs that this process may use, in its order.
        driver: Version of NVIDIA's driver; empty where there is none.
        obstacle: Why GPUs that are here cannot be used; empty where none are, or all can.
    """

    gpus: tuple[Gpu, ...] = ()
    driver: str = ""
    obstacle: str = ""


def find_gpus(environment: Mapping[str, str] = os.environ, *, nvml: Any = None, kfd: Path = KFD) -> GpuSearch:
    """Asks NVML, torch where NVML does not answer and CUDA is here, and Linux for AMD's.

    Args:
        environment: Of this process; CUDA_VISIBLE_DEVICES selects among the GPUs.
        nvml: The module ``pynvml``, or one like it.
        kfd: Folder of the devices that ROCm computes on.
    """
    if nvml is None:
        import pynvml

        nvml = pynvml
    try:
        nvml.nvmlInit()
        driver, cards = str(nvml.nvmlSystemGetDriverVersion()), tuple(_cards(nvml))
    except nvml.NVMLError as error:
        return _without_nvml(str(error), kfd)
    gpus = visible(cards, environment.get("CUDA_VISIBLE_DEVICES"))
    if cards and not gpus:
        listed = ", ".join(gpu.uuid for card in cards for gpu in card.gpus)
        value = environment.get("CUDA_VISIBLE_DEVICES")
        return GpuSearch(driver=driver, obstacle=f"CUDA_VISIBLE_DEVICES={value} names none of this machine's: {listed}")
    return GpuSearch(gpus=gpus, driver=driver, obstacle="" if gpus else _amd(kfd))


def visible(cards: Sequence[Card], setting: str | None) -> tuple[Gpu, ...]:
    """Returns the GPUs that CUDA_VISIBLE_DEVICES selects.

    As in CUDA, what follows an unknown entry is not visible, the start of a UUID is enough, and a process uses one MIG
    instance of a card. Cards are counted as nvidia-smi counts them, by their place on the PCI bus.
    """
    whole = tuple(gpu for card in cards if not card.has_mig for gpu in card.gpus)
    if setting is None:
        return whole or tuple(gpu for card in cards for gpu in card.gpus[:1])[:1]
    chosen: list[Gpu] = []
    for entry in setting.split(","):
        gpu = _named(cards, entry.strip())
        if gpu is None:
            break
        chosen.append(gpu)
    return tuple(chosen)


def binding(gpus: Sequence[Gpu], local: int, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns the variables with which a process sees one GPU only, as ``cuda:0``.

    LOCAL_RANK becomes 0, where a launcher has set it: accelerate takes it for the number of the process's GPU.

    Args:
        gpus: Those that the processes of this machine may use.
        local: Index of this process on its machine.
        environment: Of this process.

    Raises:
        IndexError: There are fewer GPUs than processes.
    """
    setting = environment.get("CUDA_VISIBLE_DEVICES")
    entries = setting.split(",") if setting else [str(index) for index in range(len(gpus))]
    device = {"CUDA_VISIBLE_DEVICES": gpus[local].uuid or entries[local].strip(), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return device | ({"LOCAL_RANK": "0"} if "LOCAL_RANK" in environment else {})


def allocator_variables(environment: Mapping[str, str] = os.environ, *, system: str = sys.platform) -> dict[str, str]:
    """Returns the variables with which torch's allocator on GPUs grows its segments; none where the user set others.

    Micro-batches differ in length, and with segments of fixed sizes each new length leaves holes. torch reads the
    variables when it is imported; elsewhere than on Linux it does not support them.
    """
    if system != "linux" or {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(environment):
        return {}
    return {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def amd_gpus(kfd: Path = KFD) -> list[str]:
    """Returns the architectures of AMD GPUs, e.g. ``gfx1100``."""
    names = []
    for file in sorted(kfd.glob("*/properties")):
        pairs = (line.split() for line in file.read_text(encoding="utf-8").splitlines())
        version = int(next((pair[1] for pair in pairs if pair and pair[0] == "gfx_target_version"), "0"))
        if version:  # 0 for a CPU
            names.append(f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}")
    return names


def _named(cards: Sequence[Card], entry: str) -> Gpu | None:
    if entry.isdigit():
        return cards[int(entry)].gpus[0] if int(entry) < len(cards) and cards[int(entry)].gpus else None
    if not entry.startswith(("GPU-", "MIG-")):
        return None
    instances = [gpu for card in cards for gpu in card.gpus if gpu.uuid.startswith(entry)]
    instances += [card.gpus[0] for card in cards if card.has_mig and card.gpus and card.uuid.startswith(entry)]
    return instances[0] if len(instances) == 1 else None


def _cards(nvml: Any) -> Iterator[Card]:
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        capability = ".".join(map(str, nvml.nvmlDeviceGetCudaComputeCapability(handle)))
        has_mig = _has_mig(nvml, handle)
        handles = list(_instances(nvml, handle)) if has_mig else [handle]
        gpus = tuple(_gpu(nvml, one, capability=capability) for one in handles)
        yield Card(uuid=str(nvml.nvmlDeviceGetUUID(handle)), gpus=gpus, has_mig=has_mig)


def _has_mig(nvml: Any, handle: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except nvml.NVMLError:  # most GPUs do not have the mode
        return False


def _instances(nvml: Any, handle: Any) -> Iterator[Any]:
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            yield nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
        except nvml.NVMLError:  # this slot is empty
            continue


def _gpu(nvml: Any, handle: Any, *, capability: str) -> Gpu:
    """Describes a GPU; one without memory of its own (Jetson, DGX Spark) has the host's."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        total, free = int(memory.total), int(memory.free)
    except nvml.NVMLError:
        total = free = 0
    if not total:
        host = psutil.virtual_memory()
        total, free = int(host.total), int(host.available)
    name, uuid = str(nvml.nvmlDeviceGetName(handle)), str(nvml.nvmlDeviceGetUUID(handle))
    return Gpu(name=name, memory_bytes=total, capability=capability, uuid=uuid, free_bytes=free)


def _without_nvml(error: str, kfd: Path) -> GpuSearch:
    """Asks torch where CUDA's driver is here although NVML is not, as in some containers and on a Jetson."""
    if not has_cuda_driver():
        return GpuSearch(obstacle=_amd(kfd))
    from finetune.hardware.cuda import report_of_torch

    report = report_of_torch()
    obstacle = "" if report.gpus else f"CUDA's driver is here, but NVML fails ({error}) and torch too ({report.error})"
    return GpuSearch(gpus=report.gpus, obstacle=obstacle)


def has_cuda_driver() -> bool:
    """Tells whether CUDA's driver can be loaded."""
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return False
    return True


def _amd(kfd: Path) -> str:
    names = amd_gpus(kfd)
    return f"this machine has AMD GPUs ({', '.join(names)}), and {ROCM}" if names else ""
