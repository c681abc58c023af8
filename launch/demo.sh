#!/usr/bin/env bash
# Trains a small CLIP on the shipped pictures, evaluates it on concepts it never saw, converts it to
# OpenCLIP and shows what came out. Two processes share the model (tensor and sequence parallel), on
# GPUs where there are two, else on the CPU; a single GPU runs it alone.
#
#   bash launch/demo.sh [key=value ...]     config keys over configs/demo.yaml, e.g. train.steps=50
#
# The same command again goes on with an interrupted run, or shows a finished one once more.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

run=${RUN:-runs/demo}
test_shards='launch/demo_data/test-{0000..0001}.tar'

source launch/environment.sh
setup_environment demo

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
processes=2
if [ "$gpus" -eq 1 ]; then
    processes=1
    echo "One GPU: one process and parallel.tensor=1 (two processes would need a GPU each)."
fi
if [ "$gpus" -eq 0 ] && [ -z "${OMP_NUM_THREADS:-}" ]; then
    cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)))')
    export OMP_NUM_THREADS=$((cores > processes ? cores / processes : 1))
fi

echo "== Training: $processes process(es), tensor parallel $processes"
python -m torch.distributed.run --standalone --nproc-per-node "$processes" \
    -m parallel_clip train configs/demo.yaml \
    run_dir="$run" parallel.tensor="$processes" parallel.sequence=true "$@"

echo "== Evaluating on concepts held out of training"
python -m parallel_clip evaluate retrieval "$run" --data "$test_shards" --json "$run/retrieval.json"
python -m parallel_clip evaluate zero-shot "$run" --data "$test_shards" \
    --classes launch/demo_data/classes.txt --templates launch/demo_data/templates.txt \
    --json "$run/zero_shot.json"

if [ ! -d "$run/openclip" ]; then
    echo "== Converting to OpenCLIP"
    rm -rf "$run/openclip.part"
    python -m parallel_clip convert "$run" "$run/openclip.part" --to openclip
    mv "$run/openclip.part" "$run/openclip"
fi

echo "== Loading the converted checkpoint with open_clip"
python launch/demo_report.py "$run" --openclip "$run/openclip" --data "$test_shards"
