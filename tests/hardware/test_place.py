"""Placement is a pure function, so machines that nobody here has can be tried."""

import dataclasses
import re

import pytest
import yaml

from finetune.bench.quantization import quantization_options
from finetune.config import load
from finetune.errors import ConfigError, HardwareError
from finetune.hardware import Machine, place, probe
from finetune.hardware.backends import BACKENDS, markdown
from finetune.hardware.gpus import Gpu
from finetune.paths import CONF
from tests.fixtures.gpus import CPU, GIB, RTX4090, config

T4 = Machine(
    cores=4,
    ram_bytes=16 * GIB,
    disk_free_bytes=100 * GIB,
    gpus=(Gpu(name="T4", memory_bytes=15 * GIB, capability="7.5"),),
)
MAC = Machine(cores=8, ram_bytes=16 * GIB, disk_free_bytes=100 * GIB, metal=True, processor="arm64")
AVX2 = dataclasses.replace(CPU, features=())
GRAVITON = dataclasses.replace(AVX2, processor="aarch64")


@pytest.mark.parametrize(
    ("machine", "device", "dtype", "optimizer"),
    [
        (CPU, "cpu", "bfloat16", "adamw_8bit"),
        (RTX4090, "cuda", "bfloat16", "paged_adamw_8bit"),
        (T4, "cuda", "float16", "paged_adamw_8bit"),
        (MAC, "cpu", "bfloat16", "adamw_8bit"),
        (AVX2, "cpu", "float32", "adamw_8bit"),
        (dataclasses.replace(CPU, features=("amx_bf16",)), "cpu", "bfloat16", "adamw_8bit"),
        (dataclasses.replace(AVX2, features=("avx512f",)), "cpu", "float32", "adamw_8bit"),
        (GRAVITON, "cpu", "bfloat16", "adamw_8bit"),
    ],
)
def test_auto_takes_what_the_machine_has(machine: Machine, device: str, dtype: str, optimizer: str) -> None:
    chosen = place(machine, config())
    assert (chosen.device, chosen.dtype, chosen.optimizer) == (device, dtype, optimizer)
    assert len(chosen.reasons) == 5


def test_optimizer_without_paging_says_why() -> None:
    assert place(CPU, config()).optimizer_reason == (
        "paged_adamw_8bit needs unified memory to page to, which cpu does not have; "
        "this is the same optimizer without paging"
    )


def test_a_cpu_without_bfloat16_instructions_computes_in_float32_and_says_why() -> None:
    reason = next(reason for reason in place(AVX2, config()).reasons if reason.startswith("dtype"))
    assert reason.startswith("dtype float32: this CPU has neither avx512_bf16 nor amx_bf16")
    assert "without vector instructions" in reason


def test_a_named_machine_without_a_gpu_has_this_machines_cpu() -> None:
    named, here = probe(load(["+experiment=quickstart", "hardware=cpu_16gb"]).hardware), probe()
    assert (named.features, named.processor, named.ram_bytes) == (here.features, here.processor, 16 * GIB)


def test_an_explicit_bfloat16_is_honoured_on_any_cpu() -> None:
    chosen = place(AVX2, config(dtype="bfloat16"))
    assert chosen.dtype == "bfloat16"
    assert "dtype bfloat16: as set by model.dtype" in chosen.reasons


def test_the_key_has_what_changes_a_result_and_not_threads_or_reasons() -> None:
    here = place(CPU, config())
    more_cores = place(dataclasses.replace(CPU, cores=64), config())
    assert here != more_cores
    assert here.key() == more_cores.key()
    assert here.key() == {"device": "cpu", "dtype": "bfloat16", "attention": "sdpa", "optimizer": "adamw_8bit"}
    assert here.key() != place(AVX2, config()).key()


def test_dense_models_may_use_an_apple_gpu() -> None:
    assert place(MAC, config(method="none")).device == "mps"


@pytest.mark.parametrize(
    ("machine", "changes", "message"),
    [
        (CPU, {"device": "cuda"}, "no NVIDIA GPU is visible"),
        (CPU, {"device": "mps"}, "this is not an Apple GPU"),
        (
            MAC,
            {"device": "mps"},
            "quantization.method=nf4 does not run on mps; choose one of none, or hardware.device=cpu",
        ),
        (MAC, {"device": "mps", "method": "hqq"}, "quantization.method=hqq does not run on mps; choose one of none"),
        (T4, {"dtype": "bfloat16"}, "T4 has 7.5; use model.dtype=float16"),
        (CPU, {"attention": "flash_attention_2"}, "needs a CUDA GPU and this run is on cpu; use model.attention=sdpa"),
    ],
)
def test_impossible_wish_names_the_alternative(machine: Machine, changes: dict[str, str], message: str) -> None:
    with pytest.raises(HardwareError, match=message):
        place(machine, config(**changes))


@pytest.mark.parametrize("name", [name for name, backend in BACKENDS.items() if not backend.devices])
def test_a_method_that_runs_nowhere_says_why_and_names_one_that_runs(name: str) -> None:
    backend = BACKENDS[name]
    assert backend.reason
    assert not backend.tunable
    alternative = backend.alternative.removeprefix("quantization=")
    assert backend.alternative.startswith("model.name=") or alternative in quantization_options([], where="test")
    with pytest.raises(
        ConfigError,
        match=re.escape(f"quantization.method={name} does not run: {backend.reason}; choose {backend.alternative}"),
    ):
        load(["+experiment=quickstart", f"quantization={name}"])


@pytest.mark.parametrize("machine", [CPU, RTX4090])
@pytest.mark.parametrize("name", [name for name, backend in BACKENDS.items() if backend.devices])
def test_a_method_that_runs_is_placed(machine: Machine, name: str) -> None:
    assert place(machine, config(method=name)).device in BACKENDS[name].devices


def test_every_method_has_a_file_of_the_group_and_every_file_a_method() -> None:
    methods = [
        yaml.safe_load((CONF / "quantization" / f"{name}.yaml").read_text())["method"]
        for name in quantization_options([], where="test")
    ]
    assert set(methods) == set(BACKENDS)


@pytest.mark.parametrize(("file", "part"), [("README.md", 0), ("docs/choosing.md", 0), ("docs/choosing.md", 1)])
def test_what_is_written_of_methods_is_the_table_in_code(file: str, part: int) -> None:
    assert markdown()[part] in (CONF.parent / file).read_text(encoding="utf-8")
