#!/usr/bin/env bash
# One node, eight GPUs, 20 hours of training in slots of 8: a minute before a slot ends, or when the job is preempted, the
# ranks write a checkpoint and the job is queued again; --resume begins the run the first time and continues it afterwards.
# What ends by itself, a divergence say, is not queued again. DATA=/my/betons sbatch examples/slurm.sh
#SBATCH --job-name=byol
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@60

torchrun --standalone --nproc-per-node=8 --no-python \
    fastbyol-train imagenet_rn50 --data "$DATA/train.beton" --val "$DATA/val.beton" \
    --budget 20h --workers 8 --out "$HOME/runs/r50" --resume &
launcher=$!
was_told=no
trap 'was_told=yes; kill -TERM "$launcher"' USR1 TERM  # torchrun hands it to every rank

wait "$launcher"
status=$?
if [ "$was_told" = yes ]; then
    wait "$launcher"  # the first wait ended with the signal
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
