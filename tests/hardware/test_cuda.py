"""One look at CUDA before anything is fetched; what torch would say elsewhere is written down here."""

import dataclasses
import json
from typing import Any

import pytest

from finetune import checks
from finetune.config import load
from finetune.errors import HardwareError
from finetune.hardware import cuda, place
from finetune.hardware.cuda import CudaReport, cuda_obstacle, has_code_for, read_report, report_of_torch
from finetune.hardware.gpus import Gpu
from tests.fixtures.gpus import GIB, RTX4090

V100 = Gpu(name="V100", memory_bytes=16 * GIB, capability="7.0")
A100 = Gpu(name="A100", memory_bytes=40 * GIB, capability="8.0")
BUILT = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
WORKS = CudaReport(torch="2.13.0+cu130", cuda="13.0", architectures=BUILT, gpus=(A100,))


def obstacle(*, gpu: Gpu = A100, driver: str = "580.65", **changes: Any) -> str | None:
    return cuda_obstacle(dataclasses.replace(WORKS, **changes), driver=driver, gpu=gpu)


def test_a_build_that_fits_is_no_obstacle() -> None:
    assert obstacle() is None
    assert obstacle(driver="") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"driver": "535.104.05"}, "CUDA 13.0, which needs driver 580 or later, and A100 .*driver 535.104.05.* update"),
        ({"gpu": V100}, "sm_75, sm_80, .* without code for V100 .compute capability 7.0"),
        ({"cuda": None}, "is built without CUDA, so it cannot use A100 .*hardware.device=cpu"),
        ({"hip": "7.1", "cuda": None}, "is built for ROCm 7.1. ROCm is not supported"),
        ({"error": "RuntimeError: no"}, "fails on A100 .*: RuntimeError: no; `nvidia-smi`"),
        ({"torch": "", "error": "it ended"}, "torch cannot look at A100 .*: it ended"),
    ],
)
def test_what_does_not_fit_is_one_message_with_driver_build_and_remedy(changes: dict[str, Any], message: str) -> None:
    import re

    found = obstacle(**changes)
    assert found is not None
    assert re.search(message, found)


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ("8.9", ("sm_80", "sm_86"), True),
        ("8.0", ("sm_86",), False),
        ("9.0", ("sm_80",), False),
        ("9.0", ("sm_80", "compute_80"), True),
        ("12.1", ("sm_120", "compute_120"), True),
        ("10.3", ("sm_100a",), False),
        ("10.3", ("sm_100f",), True),
        ("7.0", BUILT, False),
    ],
)
def test_code_runs_on_its_major_version_and_ptx_on_later_ones(
    capability: str, architectures: tuple[str, ...], runs: bool
) -> None:
    assert has_code_for(capability, architectures) is runs


def test_this_machines_torch_answers_from_a_process_of_its_own() -> None:
    import torch

    report = report_of_torch()
    assert (report.torch, report.cuda) == (torch.__version__, torch.version.cuda)
    assert bool(report.error) is not torch.cuda.is_available()


def test_a_process_that_dies_is_reported_and_not_raised() -> None:
    assert read_report("", code=-11, errors="a\nSegmentation fault").error == (
        "it ended with exit code -11: Segmentation fault"
    )
    line = json.dumps(
        {"torch": "2.13", "cuda": "13.0", "hip": None, "error": "", "gpus": [{**dataclasses.asdict(V100)}]}
    )
    assert read_report(f"a warning\n{line}\n", code=0, errors="").gpus == (V100,)


def test_a_run_looks_before_it_fetches_and_a_plan_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(["model=llama3_8b", "data.path=rows.jsonl"])
    machine = dataclasses.replace(RTX4090, driver="470.1")
    monkeypatch.setattr(cuda, "report_of_torch", lambda: WORKS)
    start = checks.Start(config=config, machine=machine, placement=place(machine, config))
    with pytest.raises(HardwareError, match="needs driver 580 or later, and RTX 4090"):
        checks._check_machine(start)
    assert checks._check_machine(dataclasses.replace(start, is_plan=True)) == []
    assert checks._check_machine(dataclasses.replace(start, machine=dataclasses.replace(machine, driver="580.1"))) == []
