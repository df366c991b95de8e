"""Writes scripts/cluster/ from the launch group: files for Slurm, Kubernetes, SkyPilot, accelerate and DeepSpeed.

python scripts/make_cluster_files.py [launch.nodes=4 launch.processes=32 ...] [folder=scripts/cluster]
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import yaml

from finetune.config import load
from finetune.launch import LaunchConfig
from finetune.launch.start import accelerate_config, zero3
from finetune.train.sampler import micro_batches

FOLDER = Path(__file__).parent / "cluster"
IMAGE = "pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime"
NOTE = "Written by scripts/make_cluster_files.py from conf/launch/multinode.yaml; change that and run it again."


def command(config: LaunchConfig, *, node: str, host: str, arguments: str) -> str:
    """Returns the command of each machine. A job that is started again continues from its last checkpoint."""
    cluster = f"launch.nodes={config.nodes} launch.processes={config.processes} launch.port={config.port}"
    here = f"launch.node={node} launch.host={host}"
    return f"python -m finetune {arguments} run.if_exists=resume launch=multinode {cluster} {here}"


def slurm(config: LaunchConfig) -> str:
    run = command(config, node='"$SLURM_NODEID"', host='"$0"', arguments='"$@"')
    return f"""#!/bin/bash
# {NOTE}
# Use: sbatch scripts/cluster/slurm.sh +experiment=llama7b_qlora run.name=first run.root=/shared/outputs
#SBATCH --job-name=finetune
#SBATCH --nodes={config.nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={config.processes // config.nodes}
#SBATCH --signal=TERM@{config.grace_seconds}
#SBATCH --requeue
#SBATCH --open-mode=append
set -eu
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 bash -c 'exec {run}' "$host" "$@"
"""


def kubernetes(config: LaunchConfig) -> list[dict[str, Any]]:
    """A headless service, which gives the first pod a name, and an indexed job."""
    labels = {"app": "finetune"}
    run = command(
        config,
        node='"$JOB_COMPLETION_INDEX"',
        host="finetune-0.finetune",
        arguments="$ARGUMENTS run.root=/shared/outputs",
    )
    container = {
        "name": "finetune",
        "image": IMAGE,
        "command": ["bash", "-c", f"pip install --quiet finetune-qlora && exec {run}"],
        "env": [
            {"name": "ARGUMENTS", "value": "+experiment=llama7b_qlora run.name=first"},
            {"name": "HF_HOME", "value": "/shared/hf"},
        ],
        "ports": [{"containerPort": config.port}],
        "resources": {"limits": {"nvidia.com/gpu": config.processes // config.nodes}},
        "volumeMounts": [{"name": "shared", "mountPath": "/shared"}, {"name": "memory", "mountPath": "/dev/shm"}],
    }
    volumes = [
        {"name": "shared", "persistentVolumeClaim": {"claimName": "finetune"}},
        {"name": "memory", "emptyDir": {"medium": "Memory"}},
    ]
    pod = {
        "subdomain": "finetune",
        "restartPolicy": "OnFailure",
        "terminationGracePeriodSeconds": config.grace_seconds,
        "containers": [container],
        "volumes": volumes,
    }
    job = {
        "completions": config.nodes,
        "parallelism": config.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 6,
        "template": {"metadata": {"labels": labels}, "spec": pod},
    }
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "finetune"},
            "spec": {"clusterIP": "None", "selector": labels},
        },
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "finetune"}, "spec": job},
    ]


def skypilot(config: LaunchConfig) -> dict[str, Any]:
    run = command(
        config, node="$SKYPILOT_NODE_RANK", host='$(echo "$SKYPILOT_NODE_IPS" | head -n 1)', arguments="$ARGUMENTS"
    )
    return {
        "name": "finetune",
        "num_nodes": config.nodes,
        "resources": {"accelerators": f"A100-80GB:{config.processes // config.nodes}", "ports": config.port},
        "envs": {"ARGUMENTS": "+experiment=llama7b_qlora run.name=first run.root=/shared/outputs"},
        "file_mounts": {"/shared": {"name": "finetune-outputs", "mode": "MOUNT"}},
        "setup": "pip install finetune-qlora\n",
        "run": run + "\n",
    }


def accelerate(config: LaunchConfig, strategy: str) -> str:
    """For one machine: ``accelerate launch --config_file <this> -m finetune ...`` needs no ``launch=``."""
    alone = dataclasses.replace(config, strategy=strategy, nodes=1, node=0, host="127.0.0.1")
    return f"# {NOTE}\n" + yaml.safe_dump(accelerate_config(alone), sort_keys=False)


def zero() -> str:
    """Returns ZeRO-3's settings for 70 billion weights, for other trainers: this one uses launch=fsdp."""
    config = load(["+experiment=llama70b_qlora_fsdp", "launch=deepspeed", "train.micro_batch=1"])
    train, processes = config.train, config.launch.processes
    rows = max(1, (train.tokens_per_step or 0) // config.data.max_tokens)
    accumulate = micro_batches(rows, micro_batch=train.micro_batch_rows, processes=processes)
    settings = zero3(
        config.launch,
        dtype="bfloat16",
        micro_batch=train.micro_batch_rows,
        accumulate=accumulate,
        max_grad_norm=config.optim.max_grad_norm,
    )
    return json.dumps(settings, indent=2) + "\n"


def files(config: LaunchConfig) -> dict[str, str]:
    """Returns the name and text of each file."""
    as_yaml = {"sort_keys": False, "width": 1000}
    return {
        "slurm.sh": slurm(config),
        "kubernetes.yaml": f"# {NOTE}\n" + yaml.safe_dump_all(kubernetes(config), **as_yaml),
        "skypilot.yaml": f"# {NOTE}\n" + yaml.safe_dump(skypilot(config), **as_yaml),
        "zero3.json": zero(),
        **{f"accelerate_{strategy}.yaml": accelerate(config, strategy) for strategy in ("ddp", "fsdp")},
    }


def shipped() -> LaunchConfig:
    return load(["+experiment=quickstart", "launch=multinode", "launch.host=first"]).launch


def main() -> None:
    folder = next((Path(one.partition("=")[2]) for one in sys.argv[1:] if one.startswith("folder=")), FOLDER)
    overrides = [one for one in sys.argv[1:] if not one.startswith("folder=")]
    config = load(["+experiment=quickstart", "launch=multinode", "launch.host=first", *overrides]).launch
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files(config).items():
        (folder / name).write_text(text, encoding="utf-8")
        print(folder / name)


if __name__ == "__main__":
    main()
