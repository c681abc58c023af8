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

RUN="${RUN:-runs/demo}"           # the run folder
TEST='launch/demo_data/test-{0000..0001}.tar'

source launch/environment.sh
setup_environment demo

processes="$(demo_processes)"
echo "== Training, the model split over $processes process(es)"
PROCESSES="$processes" bash launch/torchrun.sh configs/demo.yaml \
    run_dir="$RUN" parallel.tensor="$processes" parallel.sequence=true "$@"

echo "== Evaluating on concepts that training never saw"
"$PYTHON" -m parallel_clip evaluate retrieval "$RUN" --data "$TEST" --json "$RUN/retrieval.json"
"$PYTHON" -m parallel_clip evaluate zero-shot "$RUN" --data "$TEST" \
    --classes launch/demo_data/classes.txt --templates launch/demo_data/templates.txt \
    --json "$RUN/zero_shot.json"

if [ ! -d "$RUN/openclip" ]; then
    echo "== Converting to OpenCLIP"
    rm -rf "$RUN/openclip.part"
    "$PYTHON" -m parallel_clip convert "$RUN" "$RUN/openclip.part" --to openclip
    mv "$RUN/openclip.part" "$RUN/openclip"
fi

echo "== Loading the converted checkpoint with open_clip"
"$PYTHON" launch/demo_report.py "$RUN" --openclip "$RUN/openclip" --data "$TEST"
