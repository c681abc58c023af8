#!/usr/bin/env bash
# Trains on one machine or on several, with torchrun.
#
#   bash launch/torchrun.sh CONFIG [key=value ...]
#
# On several machines, run the same command on each, with the same three variables:
#
#   NODES=2 RENDEZVOUS=first-host:29500 JOB=clip-1 bash launch/torchrun.sh CONFIG ...
#
# The same command again goes on with an interrupted run from its last checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# ---- parameters: edit here or set them in the environment ----
NODES="${NODES:-1}"               # machines
PROCESSES="${PROCESSES:-}"        # processes on each machine; empty: one a GPU, or one without GPUs
RENDEZVOUS="${RENDEZVOUS:-}"      # host:port that every machine can reach; one of the machines
JOB="${JOB:-parallel_clip}"       # a name that tells this job from others at the same address
SAVE_SECONDS="${SAVE_SECONDS:-300}"  # that a job which is told to stop has to save, before it is killed

# Lets communication of tensor parallelism overlap with computation (Hopper GPUs and older).
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# Where machines have several networks, NCCL may need to be told which ones to use, e.g.:
# export NCCL_SOCKET_IFNAME=eth0 NCCL_IB_HCA=mlx5
# export NCCL_DEBUG=INFO            # says what it chose

# ---- nothing to edit below ----
if [ "$#" -eq 0 ]; then
    echo "usage: bash launch/torchrun.sh CONFIG [key=value ...]" >&2
    exit 2
fi
if [ "$NODES" -gt 1 ] && [ -z "$RENDEZVOUS" ]; then
    echo "error: NODES=$NODES needs RENDEZVOUS=host:port, the same on every machine" >&2
    exit 2
fi

source launch/environment.sh
setup_environment

if [ -z "$PROCESSES" ]; then
    gpus="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')"
    PROCESSES=$((gpus > 0 ? gpus : 1))
fi
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    cores="$(nproc)"
    export OMP_NUM_THREADS=$((cores > PROCESSES ? cores / PROCESSES : 1))
fi

where=(--standalone)
if [ "$NODES" -gt 1 ]; then
    where=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS" --rdzv-id "$JOB")
fi

# torchrun dies of USR1, by which schedulers announce a time limit, unless it is told to pass it on,
# and gives its processes 30 s to save. Older ones cannot be told otherwise.
options=()
help="$("$PYTHON" -m torch.distributed.run --help)"
if [[ "$help" == *--signals-to-handle* ]]; then
    options+=(--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1)
fi
if [[ "$help" == *--shutdown-timeout* ]]; then
    options+=(--shutdown-timeout "$SAVE_SECONDS")
fi

echo "Starting $PROCESSES process(es) on this machine, $NODES machine(s) in all."
# No restarts: a wrong input would only be wrong again, and the command itself resumes.
exec "$PYTHON" -m torch.distributed.run "${where[@]}" "${options[@]}" --nproc-per-node "$PROCESSES" \
    --max-restarts 0 -m parallel_clip train "$@"
