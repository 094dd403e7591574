#!/usr/bin/env bash
# One node, eight GPUs, as long as the allocation lasts. Preempted or out of time, the job is queued again and continues:
# --resume begins the run the first time and takes it up afterwards. sbatch examples/slurm.sh
#SBATCH --job-name=byol
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@60
# Slurm tells this shell a minute before the end; the shell tells torchrun, which stops every rank after a checkpoint.
trap 'kill -TERM "$launcher"' USR1 TERM

torchrun --standalone --nproc-per-node=8 --no-python \
    fastbyol-train imagenet_rn50 --data "$DATA/train.beton" --val "$DATA/val.beton" \
    --budget 20h --workers 8 --out "$HOME/runs/r50" --resume &
launcher=$!
wait "$launcher"
status=$?
[ "$status" -gt 128 ] && { wait "$launcher"; status=$?; }  # the first wait ended with the signal

# 20 h of training in slots of 8 h: queue again until result.json is there
if [ "$status" -ne 0 ] && [ ! -e "$HOME/runs/r50/result.json" ] && [ -e "$HOME/runs/r50/config.json" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
