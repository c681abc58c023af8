#!/usr/bin/env bash
# Sets up an environment and runs all tests; arguments go to pytest:
#
#   bash tests/run.sh
#   bash tests/run.sh tests/test_layout.py
#   bash tests/run.sh -m long                # golden runs: 20 steps in every layout and precision
#   bash tests/run.sh -m parity              # the full grid against open_clip, hours on a CPU
#   bash tests/run.sh -n 2 --dist loadfile   # two files side by side, in half the time
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source launch/environment.sh
setup_environment test

# Tests start several processes each; one thread a process keeps them from crowding the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

"$PYTHON" -m ruff check .

status=0
"$PYTHON" -m pytest "$@" || status=$?
if [ "$status" -eq 5 ]; then
    echo "error: not one test was found" >&2
    exit 1
fi
exit "$status"
