#!/usr/bin/env bash
# Two nodes of eight GPUs, 20 hours of training in slots of 8: srun starts a process for each GPU, and each finds
# its rank in Slurm's variables. A minute before a slot ends, or when the job is preempted, the ranks write a checkpoint and
# end with status 75, and the job is queued again; --resume begins the run the first time and continues it afterwards.
# What ends by itself, a divergence say, is not queued again. One node: --nodes=1. The betons, the environment and the run
# folder lie on disks that all nodes see.
# DATA=/my/betons ENVIRONMENT=/my/venv sbatch examples/slurm.sh
#SBATCH --job-name=byol
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@60

source "$ENVIRONMENT/bin/activate"  # conda: source "$(conda info --base)/etc/profile.d/conda.sh"; conda activate NAME

srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 \
    fastbyol-train imagenet_rn50 --data "$DATA/train.beton" --val "$DATA/val.beton" \
    --budget 20h --out "$HOME/runs/r50" --resume &
step=$!
trap 'kill -TERM "$step"' USR1 TERM  # srun hands it to every rank

wait "$step"
status=$?
if [ "$status" -gt 128 ]; then  # the signal ended the wait alone
    wait "$step"
    status=$?
fi
if [ "$status" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
