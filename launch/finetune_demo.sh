#!/usr/bin/env bash
# Fine-tunes the demo's model on small pictures, at a higher resolution and with its text tower
# frozen; evaluates it before and after, on small and on full-size pictures, and the means of both
# weights between.
#
#   bash launch/finetune_demo.sh [key=value ...]     config keys over configs/recipes/finetune_demo.yaml
#
# It starts from the run of launch/demo.sh, which comes first where it has not been run. The same
# command again goes on with what was interrupted, or shows a finished one once more.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

DEMO="${DEMO:-}"                     # a finished run of launch/demo.sh; not given: runs/demo
OUT="${OUT:-runs/finetune_demo}"     # the folder of all that is made here
CONFIG=configs/recipes/finetune_demo.yaml
TEST='test-{0000..0001}.tar'

if [ -n "$DEMO" ] && [ ! -e "$DEMO" ]; then
    echo "error: DEMO=$DEMO does not exist (paths start from $PWD); name a run of launch/demo.sh," \
        "or leave DEMO out to train one in runs/demo" >&2
    exit 2
fi

source launch/environment.sh
setup_environment demo

if [ -z "$DEMO" ]; then
    DEMO=runs/demo
    if ! grep -qs '"state": "finished"' "$DEMO/status.json"; then
        echo "== The demo's run comes first: launch/demo.sh"
        RUN="$DEMO" bash launch/demo.sh
    fi
fi

if [ ! -d "$OUT/small" ]; then
    echo "== Making the demo's pictures small"
    rm -rf "$OUT/small.part"
    "$PYTHON" launch/demo_data/make_small_pictures.py "$OUT/small.part"
    mv "$OUT/small.part" "$OUT/small"
fi
keys=(init.from="$DEMO" data.train.0.shards="$OUT/small/train-{0000..0007}.tar" "$@")

# Weights are averaged between models of one size. A step with a learning rate of 0 changes none, so
# this checkpoint has the demo's, with positions interpolated.
if [ ! -f "$OUT/before/checkpoints/latest" ]; then
    echo "== Bringing the demo's weights to the new resolution, untrained"
    "$PYTHON" -m parallel_clip train "$CONFIG" "${keys[@]}" run_dir="$OUT/before" \
        optimizer.lr=0 schedule.warmup=0 train.steps=1 train.samples=null train.epochs=null
fi

processes="$(demo_processes)"
echo "== Fine-tuning on small pictures, $processes process(es)"
PROCESSES="$processes" bash launch/torchrun.sh "$CONFIG" "${keys[@]}" run_dir="$OUT/after"

echo "== Evaluating before, after and between, on concepts that neither run saw"
"$PYTHON" launch/finetune_report.py "$OUT" --demo "$DEMO" \
    --tuned-on "$OUT/small/$TEST" --not-tuned-on "launch/demo_data/$TEST"
