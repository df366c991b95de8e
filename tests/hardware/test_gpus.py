"""What is found of GPUs, and which of them a process sees, on machines that nobody here has."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from finetune import hardware
from finetune.errors import HardwareError
from finetune.hardware import gpus
from finetune.hardware.gpus import allocator_variables, amd_gpus, binding, find_gpus
from finetune.hardware.place import bind_to_gpu, place
from tests.fixtures.gpus import CPU, GIB, RTX4090, FakeCard, FakeNvml, config

SMALL = FakeCard("T4", "GPU-1111", 15 * GIB, (7, 5))
LARGE = FakeCard("A100", "GPU-2222", 40 * GIB, (8, 0))
SLICES = (FakeCard("A100 MIG 3g.20gb", "MIG-aaaa", 20 * GIB), FakeCard("A100 MIG 1g.5gb", "MIG-bbbb", 5 * GIB))
SLICED = FakeCard("A100", "GPU-3333", 40 * GIB, (8, 0), mig=SLICES)
SPARK = FakeCard("GB10", "GPU-4444", None, (12, 1))
TWO = FakeNvml((SMALL, LARGE))


def names(nvml: FakeNvml, setting: str | None = None) -> list[str]:
    environment = {} if setting is None else {"CUDA_VISIBLE_DEVICES": setting}
    return [gpu.name for gpu in find_gpus(environment, nvml=nvml).gpus]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, ["T4", "A100"]),
        ("1,0", ["A100", "T4"]),
        ("GPU-2222", ["A100"]),
        ("GPU-22", ["A100"]),
        ("GPU-2222,GPU-1111", ["A100", "T4"]),
        ("0,-1,1", ["T4"]),
        ("", []),
        ("GPU-", []),
        ("7", []),
    ],
)
def test_cuda_visible_devices_selects_by_number_and_by_uuid(setting: str | None, expected: list[str]) -> None:
    assert names(TWO, setting) == expected


def test_a_selection_of_nothing_is_explained_and_is_not_taken_for_a_machine_without_gpus() -> None:
    found = find_gpus({"CUDA_VISIBLE_DEVICES": "GPU-9"}, nvml=TWO)
    assert found.obstacle == "CUDA_VISIBLE_DEVICES=GPU-9 names none of this machine's: GPU-1111, GPU-2222"


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, ["A100 MIG 3g.20gb"]),
        ("MIG-bbbb", ["A100 MIG 1g.5gb"]),
        ("0", ["A100 MIG 3g.20gb"]),
        ("GPU-3333", ["A100 MIG 3g.20gb"]),
    ],
)
def test_a_mig_instance_is_a_gpu_with_its_own_memory(setting: str | None, expected: list[str]) -> None:
    assert names(FakeNvml((SLICED,)), setting) == expected
    environment = {"CUDA_VISIBLE_DEVICES": setting} if setting else {}
    (gpu,) = find_gpus(environment, nvml=FakeNvml((SLICED,))).gpus
    assert gpu.memory_bytes == (5 if "bbbb" in gpu.uuid else 20) * GIB
    assert gpu.capability == "8.0"


def test_a_gpu_without_memory_of_its_own_has_the_hosts() -> None:
    (gpu,) = find_gpus({}, nvml=FakeNvml((SPARK,))).gpus
    assert gpu.memory_bytes == psutil.virtual_memory().total
    assert 0 < gpu.free_bytes < gpu.memory_bytes


def test_driver_and_free_memory_are_read() -> None:
    found = find_gpus({}, nvml=TWO)
    assert (found.driver, found.gpus[1].free_bytes, found.obstacle) == ("580.65.06", 39 * GIB, "")


def test_torch_is_asked_where_nvml_is_missing_and_cuda_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = FakeNvml(missing="Driver Not Loaded")
    monkeypatch.setattr(gpus, "has_cuda_driver", lambda: True)
    obstacle = find_gpus({}, nvml=missing).obstacle  # the torch of this machine has no CUDA
    assert obstacle.startswith("CUDA's driver is here, but NVML fails (Driver Not Loaded) and torch too (")
    monkeypatch.setattr(gpus, "has_cuda_driver", lambda: False)
    assert find_gpus({}, nvml=missing, kfd=Path("nowhere")) == gpus.GpuSearch()


def test_an_amd_gpu_is_named_and_refused_with_the_reason(tmp_path: Path) -> None:
    for node, version in enumerate((0, 110000, 90010)):
        (tmp_path / str(node)).mkdir()
        (tmp_path / str(node) / "properties").write_text(f"simd_count 8\ngfx_target_version {version}\n")
    assert amd_gpus(tmp_path) == ["gfx1100", "gfx90a"]
    obstacle = find_gpus({}, nvml=FakeNvml(missing="Library Not Found"), kfd=tmp_path).obstacle
    assert obstacle.startswith("this machine has AMD GPUs (gfx1100, gfx90a), and ROCm is not supported: ")
    machine = hardware.Machine(cores=2, ram_bytes=GIB, disk_free_bytes=GIB, gpu_obstacle=obstacle)
    assert f"device cpu: {obstacle}" in place(machine, config()).reasons
    with pytest.raises(HardwareError, match=r"hardware.device=cuda, but this machine has AMD GPUs"):
        place(machine, config(device="cuda"))


def test_the_dtype_is_that_of_the_gpus_that_are_used() -> None:
    found = find_gpus({"CUDA_VISIBLE_DEVICES": "1,0"}, nvml=TWO).gpus
    machine = hardware.Machine(cores=2, ram_bytes=GIB, disk_free_bytes=GIB, gpus=found)
    assert place(machine, config()).dtype == "bfloat16"
    assert place(machine, config(processes=2)).dtype == "float16"


@pytest.mark.parametrize(
    ("local", "environment", "expected"),
    [
        (0, {}, {"CUDA_VISIBLE_DEVICES": "GPU-1111", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}),
        (1, {"LOCAL_RANK": "1"}, {"CUDA_VISIBLE_DEVICES": "GPU-2222", "LOCAL_RANK": "0"}),
    ],
)
def test_each_process_is_bound_to_its_gpu(local: int, environment: dict[str, str], expected: dict[str, str]) -> None:
    variables = binding(find_gpus(environment, nvml=TWO).gpus, local, environment)
    assert expected.items() <= variables.items()


def test_a_gpu_without_uuid_is_bound_as_the_user_named_it() -> None:
    nameless = gpus.Gpu(name="Orin", memory_bytes=GIB, capability="8.7")
    assert binding([nameless, nameless], 1, {"CUDA_VISIBLE_DEVICES": "3, 5"})["CUDA_VISIBLE_DEVICES"] == "5"
    assert binding([nameless], 0, {})["CUDA_VISIBLE_DEVICES"] == "0"


def test_segments_may_grow_unless_the_user_set_the_allocator() -> None:
    assert allocator_variables({}, system="linux") == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert allocator_variables({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, system="linux") == {}
    assert allocator_variables({}, system="win32") == {}


PARSED = "import torch; print(len(torch.cuda._parse_visible_devices()))"


def test_torch_itself_counts_one_gpu_after_binding() -> None:
    variables = binding(find_gpus({}, nvml=TWO).gpus, 1, {})
    counted = [
        subprocess.run([sys.executable, "-c", PARSED], env={**os.environ, **extra}, capture_output=True, text=True)
        for extra in ({"CUDA_VISIBLE_DEVICES": "GPU-1111,GPU-2222"}, variables)
    ]
    assert [done.stdout.strip() for done in counted] == ["2", "1"]


def test_more_processes_than_gpus_are_refused_and_a_cpu_is_not_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    bind_to_gpu(CPU, place(CPU, config()), local=3)
    assert os.environ == {}
    with pytest.raises(HardwareError, match="process 2 of this machine has no GPU: 1 can be used \\(RTX 4090\\)"):
        bind_to_gpu(RTX4090, place(RTX4090, config()), local=1)


def test_trl_refuses_a_process_that_sees_two_gpus(tiny_base: Path, tokenizer: Any, tmp_path: Path) -> None:
    """The reason for binding, and that it still holds: without it every training on such a machine ends here."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from tests.fixtures.models import load

    arguments = SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_length=8)
    rows = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}])
    for count in (1, 2):
        assert arguments.device.type == "cpu"  # n_gpu is counted once, here
        arguments._n_gpu = count
        make = lambda: SFTTrainer(load(tiny_base, "none"), arguments, train_dataset=rows, processing_class=tokenizer)  # noqa: E731
        if count == 1:
            assert make() is not None
            continue
        with pytest.raises(ValueError, match=r"nn\.DataParallel"):
            make()
