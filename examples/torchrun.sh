#!/usr/bin/env bash
# Several machines with eight GPUs each; run this on each of them: examples/torchrun.sh NODES HOST_OF_THE_FIRST
# --batch-size counts the images of all ranks. The run folder lies on a disk all machines see; rank 0 alone writes to it.
# A rank that dies ends all; they are started again, up to three times whatever the reason, and --resume continues. TERM
# is handed to the ranks, which have 30 s to write a checkpoint, and the launcher ends with status 75.
set -euo pipefail
fastbyol-torchrun --nnodes="$1" --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint="$2:29500" --max-restarts=3 --no-python \
    fastbyol-train imagenet_rn50 --data train.beton --val val.beton \
    --batch-size 4096 --budget 8h --workers 8 --out runs/r50 --resume
