"""Starts the processes of a launch with accelerate's launcher, and writes the configurations that launchers read."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from finetune.console import log, print_error
from finetune.errors import EXIT_INTERRUPTED, HardwareError
from finetune.launch.config import LaunchConfig, process_count


def must_start(config: LaunchConfig) -> bool:
    """Returns whether this is the user's own process, and the processes that train must still be started."""
    return config.strategy != "single" and process_count() == 1


def accelerate_config(config: LaunchConfig) -> dict[str, Any]:
    """Returns the content of ``accelerate launch --config_file``.

    ``MULTI_GPU`` means torchrun, on CPUs too: ``MULTI_CPU`` means MPI. accelerate does not prepare models or optimizers
    here, so precision is left out; from the FSDP part our processes only learn that FSDP is used.
    """
    fsdp = {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
        "fsdp_offload_params": config.offload,
        "fsdp_cpu_ram_efficient_loading": False,
        "fsdp_activation_checkpointing": False,
    }
    return {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP" if config.strategy == "fsdp" else "MULTI_GPU",
        **({"fsdp_config": fsdp} if config.strategy == "fsdp" else {}),
        "num_processes": config.processes,
        "num_machines": config.nodes,
        "machine_rank": config.node,
        "main_process_ip": config.host,
        "main_process_port": config.port,
        "same_network": True,
        "rdzv_backend": "static",
        "gpu_ids": "all",
        "mixed_precision": "no",
        "dynamo_config": {"dynamo_backend": "NO"},
        "main_training_function": "main",
        "use_cpu": False,
        "debug": False,
    }


def zero3(
    config: LaunchConfig, *, dtype: str, micro_batch: int, accumulate: int, max_grad_norm: float
) -> dict[str, Any]:
    """Returns DeepSpeed's ZeRO-3 settings for accelerate's plugin; none is left to ``auto``.

    Args:
        config: The launch group.
        dtype: Of the computation.
        micro_batch: Batch size per process.
        accumulate: Micro-batches per step.
        max_grad_norm: ``optim.max_grad_norm``.

    Source: deepspeed.ai, DeepSpeed Configuration JSON.
    """
    host = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulate,
        "train_batch_size": micro_batch * accumulate * config.processes,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "stage3_gather_16bit_weights_on_model_save": False,  # only the adapter is saved
            **({"offload_param": host, "offload_optimizer": host} if config.offload else {}),
        },
    }


def check_launch(config: LaunchConfig, *, device: str, preflight: bool) -> None:
    """Checks that this launch is possible on a device.

    Args:
        config: The launch group.
        device: ``cpu``, ``cuda`` or ``mps``.
        preflight: Whether the run has a preflight stage.

    Raises:
        HardwareError: It is not; the message names the alternative.
    """
    check_strategy(config)
    if config.strategy == "fsdp" and device == "mps":
        raise HardwareError("launch=fsdp needs NVIDIA GPUs or CPUs, and this run is on mps; use launch=single")
    if config.strategy == "fsdp" and device == "cuda" and preflight:
        raise HardwareError(
            "preflight needs the whole base on one device, and launch=fsdp is for bases that do not fit there: set "
            "preflight=off, and run preflight with the same settings and a smaller base first"
        )
    if config.offload and device == "cpu":
        raise HardwareError(
            "launch.offload=true moves shards from GPU memory to host memory, and this run uses a CPU; set it to false"
        )


def check_strategy(config: LaunchConfig) -> None:
    """Checks that this version can train with the strategy.

    Raises:
        HardwareError: It can only plan with it.
    """
    if config.strategy == "deepspeed":
        raise HardwareError(
            "launch=deepspeed can be planned (finetune plan) and its settings are in scripts/cluster/zero3.json, but "
            "it cannot train: ZeRO-3 first puts the whole quantized base on each device; choose launch=fsdp, which "
            "does not"
        )


def start(config: LaunchConfig, arguments: Sequence[str]) -> int:
    """Runs ``finetune <arguments>`` in every process of this machine and waits for them.

    Args:
        config: The launch group.
        arguments: Command and overrides, as the user typed them.

    Returns:
        The exit code of the process that failed first, 0 where none did; 75 after a signal.

    Raises:
        HardwareError: The strategy can be planned but not trained with.
    """
    check_strategy(config)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    here = config.processes // config.nodes
    where = f" on machine {config.node + 1} of {config.nodes}, {config.processes} in all" if config.nodes > 1 else ""
    log(
        "launch",
        f"{config.strategy}: {here} processes{where}; each writes logs/rank-<n>.log in the run's folder",
    )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # a process that fails prints why
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(config.grace_seconds)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "accelerate.json"
        file.write_text(json.dumps(accelerate_config(config)), encoding="utf-8")
        threads = os.environ.get("OMP_NUM_THREADS", "1")
        options = ["--config_file", str(file), "--num_cpu_threads_per_process", threads]
        try:
            launch_command(launch_command_parser().parse_args([*options, "--module", "finetune", *arguments]))
        except ChildFailedError as failed:
            rank, failure = failed.get_first_failure()
            code = failure.exitcode if failure.exitcode > 0 else 1
            if rank:  # the first process has printed its error itself
                log_file = f"logs/rank-{rank}.log"
                print_error(
                    f"process {rank} ended with exit code {failure.exitcode}; see {log_file} in the run's folder", code
                )
            return code
        except SignalException:
            return EXIT_INTERRUPTED
    return 0


def exit_process(code: int) -> NoReturn:
    """Ends this process. One of several that failed ends at once: the interpreter's own shutdown would abort (exit code
    -6) in threads of the process group that still wait for a process that is gone."""
    if code and process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
