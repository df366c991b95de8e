"""The command ``env``: what a bug report needs, without secrets."""

from __future__ import annotations

import os
import platform

import yaml

import finetune
from finetune.cli.command import Command, Invocation
from finetune.console import log
from finetune.environment import PACKAGES, commit, package_version
from finetune.errors import EXIT_OK
from finetune.hardware import HardwareConfig, Machine, probe
from finetune.paths import CONF

OPTIONAL = ("gguf", "xllamacpp", "onnxruntime", "hqq", "torchao", "lm-eval", "fastapi")
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "WORLD_SIZE",
    "SLURM_JOB_ID",
)  # fmt: skip
"""Environment variables whose values are printed."""

SECRET = ("HF_TOKEN", "WANDB_API_KEY", "FINETUNE_API_KEY", "HF_HOME", "FINETUNE_CACHE")
"""Environment variables of which only is printed whether they are set: keys, and paths with people's names."""


def _env(_: Invocation) -> int:
    """Prints versions, machine and variables."""
    log("finetune", f"{finetune.__version__}, commit {commit() or 'unknown (installed from a wheel)'}")
    log("python", f"{platform.python_version()} on {platform.platform()}")
    log("packages", ", ".join(f"{name} {package_version(name) or 'not installed'}" for name in PACKAGES))
    log("optional", ", ".join(f"{name} {package_version(name) or 'not installed'}" for name in OPTIONAL))
    log("machine", *_machine_lines(probe(HardwareConfig(**yaml.safe_load((CONF / "hardware/auto.yaml").read_text())))))
    shown = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    log("variables", ", ".join(shown) or "none of those that matter are set")
    log("secret", ", ".join(f"{name} {'set' if os.environ.get(name) else 'not set'}" for name in SECRET))
    return EXIT_OK


def _machine_lines(machine: Machine) -> list[str]:
    gib = 1024**3
    gpus = [
        f"{gpu.name}, {gpu.memory_bytes / gib:.1f} GiB, compute capability {gpu.capability}" for gpu in machine.gpus
    ]
    cpu = f"{machine.cores} cores, {machine.processor}, {', '.join(machine.features) or 'features not known'}"
    memory = f"{machine.ram_bytes / gib:.1f} GiB of memory, {machine.disk_free_bytes / gib:.0f} GiB of disk free"
    return [cpu, memory, *(gpus or ["an Apple GPU" if machine.metal else "without an NVIDIA GPU"])]


ENV = Command("env", "what a bug report needs, without secrets", _env, settings=(), example="finetune env")
