#!/usr/bin/env bash
# Sets up an environment and runs all tests; arguments go to pytest:
#
#   bash tests/run.sh
#   bash tests/run.sh tests/test_layout.py
#   bash tests/run.sh -m long                # golden runs: 20 steps in every layout and precision
#   bash tests/run.sh -m parity              # the full grid against open_clip, hours on a CPU
#   bash tests/run.sh -n 0 tests/cli --pdb   # in one process
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source launch/environment.sh
setup_environment test

# Tests start several processes each; one thread a process keeps them from crowding the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

"$PYTHON" -m ruff check .

# Two at a time: one alone leaves cores idle while it waits for its processes. Tests of a file stay
# together, as they share what the file sets up. A GPU is for one at a time.
workers=2
case " $* " in *gpu*) workers=0 ;; esac

status=0
"$PYTHON" -m pytest -n "$workers" --dist loadfile "$@" || status=$?
if [ "$status" -eq 5 ]; then
    echo "error: not one test was found" >&2
    exit 1
fi
exit "$status"
