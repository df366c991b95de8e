"""Looks at CUDA once, in a process of its own, before anything is fetched: what torch can do with the GPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.errors import HardwareError
from finetune.hardware.gpus import ROCM, Gpu

if TYPE_CHECKING:
    from finetune.hardware.probe import Machine

LOOK_SECONDS = 180
"""Importing torch and starting CUDA takes seconds; on a machine without a disk cache, a minute."""

LEAST_DRIVERS = {"11": 450, "12": 525, "13": 580}
"""First driver branch for each version of CUDA. Source: CUDA Toolkit release notes, minor version compatibility."""

LOOK = """
import json, torch
report = {"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip, "error": "", "gpus": []}
try:
    torch.cuda.init()
    report["architectures"] = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        report["gpus"].append({"name": p.name, "memory_bytes": p.total_memory, "capability": f"{p.major}.{p.minor}"})
    report["gpus"][0]["free_bytes"] = torch.cuda.mem_get_info(0)[0]
    assert float((torch.ones((16, 16), device="cuda") @ torch.ones((16, 16), device="cuda")).sum()) == 4096
except Exception as error:
    report["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
print(json.dumps(report))
"""


@dataclass(frozen=True, kw_only=True)
class CudaReport:
    """What torch says about CUDA.

    Attributes:
        torch: Its version.
        cuda: Version of CUDA that it was built for; None for a build without CUDA.
        hip: Version of ROCm that it was built for.
        architectures: GPUs that it has code for, e.g. ``sm_90`` and, for later ones too, ``compute_90``.
        gpus: Those that it sees.
        error: Why it could not compute there; empty where it could.
    """

    torch: str
    cuda: str | None
    hip: str | None = None
    architectures: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    error: str = ""


def check_cuda(machine: Machine) -> None:
    """Checks that torch can compute on the first GPU of a machine.

    Raises:
        HardwareError: It cannot; the message names driver, build and what helps.
    """
    obstacle = cuda_obstacle(report_of_torch(), driver=machine.driver, gpu=machine.gpus[0])
    if obstacle:
        raise HardwareError(obstacle)


def report_of_torch() -> CudaReport:
    """Starts CUDA in a new process, multiplies two small matrices there, and returns what torch says."""
    try:
        done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, timeout=LOOK_SECONDS)
    except subprocess.TimeoutExpired:
        return CudaReport(torch="", cuda=None, error=f"it did not answer in {LOOK_SECONDS} s")
    return read_report(done.stdout, code=done.returncode, errors=done.stderr)


def read_report(output: str, *, code: int, errors: str) -> CudaReport:
    """Returns the report that a process printed as its last line; one that ended early is an error."""
    if code:
        last = errors.strip().splitlines()[-1:] or ["without a message"]
        return CudaReport(torch="", cuda=None, error=f"it ended with exit code {code}: {last[0]}")
    values = json.loads(output.strip().splitlines()[-1])
    return CudaReport(
        torch=values["torch"],
        cuda=values["cuda"],
        hip=values["hip"],
        architectures=tuple(values.get("architectures", ())),
        gpus=tuple(Gpu(**gpu) for gpu in values["gpus"]),
        error=values["error"],
    )


def cuda_obstacle(report: CudaReport, *, driver: str, gpu: Gpu) -> str | None:
    """Explains why torch cannot compute on a GPU, and what helps; None where it can.

    Args:
        report: What torch says.
        driver: Version of NVIDIA's driver; empty where it is not known.
        gpu: The GPU that this process is to use.
    """
    where = f"{gpu.name} (compute capability {gpu.capability}, driver {driver or 'unknown'})"
    if not report.torch:
        return f"torch cannot look at {where}: {report.error}; reinstall torch, or use hardware.device=cpu"
    if report.hip:
        return f"this torch ({report.torch}) is built for ROCm {report.hip}. {ROCM}; use hardware.device=cpu"
    if report.cuda is None:
        return (
            f"this torch ({report.torch}) is built without CUDA, so it cannot use {where}; install the build for CUDA "
            "(https://pytorch.org/get-started/locally), or use hardware.device=cpu"
        )
    built = f"torch {report.torch} is built for CUDA {report.cuda}"
    least, major = LEAST_DRIVERS.get(report.cuda.split(".")[0], 0), driver.split(".")[0]
    if major.isdigit() and int(major) < least:
        return f"{built}, which needs driver {least} or later, and {where} has an older one; update it"
    if report.architectures and not has_code_for(gpu.capability, report.architectures):
        return (
            f"{built} for {', '.join(report.architectures)}, without code for {where}; install a build of torch that "
            "has it, or use hardware.device=cpu"
        )
    return f"{built}, and fails on {where}: {report.error}; `nvidia-smi` shows its state" if report.error else None


def has_code_for(capability: str, architectures: tuple[str, ...]) -> bool:
    """Tells whether a build runs on a GPU: code of the same major version up to its minor one, or PTX of any earlier.

    Source: CUDA C programming guide, binary and PTX compatibility. Code with a suffix (``sm_90a``) runs there only.
    """
    major, minor = (int(part) for part in capability.split("."))
    for name in architectures:
        if (match := re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)) is None:
            continue
        kind, built, suffix = match[1], (int(match[2]), int(match[3])), match[4]
        if built == (major, minor) or (suffix == "f" and built[0] == major and built[1] <= minor):
            return True
        if not suffix and (built[0] == major and built[1] <= minor if kind == "sm" else built <= (major, minor)):
            return True
    return False
