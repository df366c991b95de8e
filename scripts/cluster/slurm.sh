#!/bin/bash
# Written by scripts/make_cluster_files.py from conf/launch/multinode.yaml; change that and run it again.
# Use: sbatch scripts/cluster/slurm.sh +experiment=llama7b_qlora run.name=first run.root=/shared/outputs
#SBATCH --job-name=finetune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -eu
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 bash -c 'exec python -m finetune "$@" run.if_exists=resume launch=multinode launch.nodes=2 launch.processes=2 launch.port=29500 launch.node="$SLURM_NODEID" launch.host="$0"' "$host" "$@"
