"""Starts the processes of a launch with accelerate's own launcher."""

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
from finetune.errors import HardwareError
from finetune.launch.config import LaunchConfig, process_count

INTERRUPTED = 75


def must_start(config: LaunchConfig) -> bool:
    """Whether this process is the user's own, and the ones that work are still to be started."""
    return config.strategy != "single" and process_count() == 1


def accelerate_config(config: LaunchConfig) -> dict[str, Any]:
    """What ``accelerate launch --config_file`` reads. Its ``MULTI_GPU`` means torchrun, on CPUs too: its ``MULTI_CPU`` means MPI.

    Models and optimizers are prepared by us, so nothing is said of precision; what is said of FSDP tells our processes of it.
    """
    fsdp = {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
        "fsdp_offload_params": config.offload,
        "fsdp_cpu_ram_efficient_loading": False,
        "fsdp_activation_checkpointing": False,
    }
    kind = (
        {"distributed_type": "FSDP", "fsdp_config": fsdp}
        if config.strategy == "fsdp"
        else {"distributed_type": "MULTI_GPU"}
    )
    return {
        "compute_environment": "LOCAL_MACHINE",
        **kind,
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


def refuse(config: LaunchConfig, *, device: str, rehearses: bool) -> None:
    """Says what this launch cannot do on a device.

    Args:
        config: The launch group.
        device: ``cpu``, ``cuda`` or ``mps``.
        rehearses: Whether the run has a rehearsal.

    Raises:
        HardwareError: With what to choose instead.
    """
    refuse_planned(config)
    if config.strategy == "fsdp" and device == "mps":
        raise HardwareError("launch=fsdp needs NVIDIA GPUs or CPUs, and this run is on mps; use launch=single")
    if config.strategy == "fsdp" and device == "cuda" and rehearses:
        raise HardwareError(
            "a rehearsal needs the whole base on one device, and launch=fsdp is for bases that have no room there: say preflight=off, and "
            "rehearse the same settings with a smaller base first"
        )
    if config.offload and device == "cpu":
        raise HardwareError(
            "launch.offload=true moves shards from a GPU's memory to the machine's, and this runs on a CPU; set it to false"
        )


def refuse_planned(config: LaunchConfig) -> None:
    """
    Raises:
        HardwareError: The strategy is planned for and not trained with.
    """
    if config.strategy == "deepspeed":
        raise HardwareError(
            "launch=deepspeed is planned (finetune plan) and its settings are written (scripts/cluster/zero3.json), and it is not trained "
            "with: ZeRO-3 brings a quantized base whole onto each device first; choose launch=fsdp, which does not"
        )


def start(config: LaunchConfig, arguments: Sequence[str]) -> int:
    """Runs ``finetune <arguments>`` in every process of this machine and waits for their end.

    Args:
        config: The launch group.
        arguments: Verb and overrides, as the user typed them.

    Returns:
        The exit code of the process that failed first, 0 where none did; 75 after a signal.

    Raises:
        HardwareError: The strategy is planned for and not trained with.
    """
    refuse_planned(config)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    here = config.processes // config.nodes
    where = f" on machine {config.node + 1} of {config.nodes}, {config.processes} in all" if config.nodes > 1 else ""
    log(
        "launch",
        f"{config.strategy}: {here} processes{where}; logs/rank-<n>.log in the run's folder has what each of them says",
    )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # a process that fails has said why
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(config.grace_seconds)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "accelerate.json"
        file.write_text(json.dumps(accelerate_config(config)), encoding="utf-8")
        told = ["--config_file", str(file), "--num_cpu_threads_per_process", os.environ.get("OMP_NUM_THREADS", "1")]
        try:
            launch_command(launch_command_parser().parse_args([*told, "--module", "finetune", *arguments]))
        except ChildFailedError as failed:
            rank, failure = failed.get_first_failure()
            code = failure.exitcode if failure.exitcode > 0 else 1
            if rank:  # the first process has said it here itself
                print_error(
                    f"process {rank} ended with exit code {failure.exitcode}; logs/rank-{rank}.log in the run's folder says why",
                    code,
                )
            return code
        except SignalException:
            return INTERRUPTED
    return 0


def end(code: int) -> NoReturn:
    """Ends this process. One of several that failed goes at once: the interpreter's own end would abort (exit code -6) in
    threads of the process group that still wait for a process that is gone."""
    if code and process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
