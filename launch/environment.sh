# Finds or makes the Python environment that everything here runs in. To be sourced:
#
#   source launch/environment.sh
#   setup_environment [demo] [test] ...     # the extras of setup.py that are needed
#
# Afterwards $PYTHON is the interpreter and its programs are first on PATH.
#
# The active environment is used where all dependencies are in it already (a container, or a virtual
# environment of your own); only the package itself is added to it. Otherwise a virtual environment
# is made, once, in .venv. Two variables change that:
#
#   PYTHON               the interpreter to use, or to make the environment with
#   PARALLEL_CLIP_VENV   where to make it, instead of .venv

PARALLEL_CLIP_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

setup_environment() {
    local active="${PYTHON:-python3}" missing
    if missing="$(_missing_modules "$active" "$@")" && [ -z "$missing" ]; then
        PYTHON="$("$active" -c 'import sys; print(sys.executable)')"
        _add_package_only
    else
        _use_own_environment "$missing" "$@"
    fi
    export PYTHON
    export PATH="$(dirname "$PYTHON"):$PATH"
}

# How many processes a demo starts: two, or one where there is a single GPU.
demo_processes() {
    if [ "$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')" -eq 1 ]; then
        echo "One GPU, so one process: two need a GPU each." >&2
        echo 1
    else
        echo 2
    fi
}

# What interpreter $1 lacks for the extras in the other arguments. Modules are looked up, not
# imported, so this is quick.
_missing_modules() {
    local python="$1" modules extra
    shift
    modules="torch torchvision megatron.core numpy pydantic yaml rich safetensors tensorboard"
    modules+=" webdataset tokenizers ftfy regex braceexpand PIL psutil xxhash"
    for extra in "$@"; do
        case "$extra" in
            test) modules+=" pytest pytest_timeout xdist hypothesis open_clip transformers ruff aiohttp matplotlib"
                  modules+=" s3fs moto.server pyarrow sentencepiece google.protobuf" ;;
            remote) modules+=" fsspec aiohttp" ;;
            s3) modules+=" fsspec aiohttp s3fs" ;;
            sentencepiece) modules+=" sentencepiece google.protobuf" ;;
            demo) modules+=" open_clip matplotlib" ;;
            plot) modules+=" matplotlib" ;;
            benchmark) modules+=" open_clip matplotlib pandas" ;;
        esac
    done
    "$python" - $modules 2>/dev/null <<'PY'
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

def missing(name):
    try:
        return find_spec(name) is None
    except ModuleNotFoundError:
        return True

def unfit(package, oldest, newest):
    try:
        numbers = tuple(map(int, re.findall(r"\d+", version(package))[:2]))
    except PackageNotFoundError:
        return False
    return not oldest <= numbers <= newest

print(
    *filter(missing, sys.argv[1:]),
    *["torch>=2.8"] * unfit("torch", (2, 8), (99, 0)),
    *["megatron-core>=0.16.1,<0.20"] * unfit("megatron-core", (0, 16), (0, 19)),
)
sys.exit(sys.version_info < (3, 11))
PY
}

# An environment that someone else made keeps its versions, so dependencies are left alone.
_add_package_only() {
    local installed
    installed="$(cd / && "$PYTHON" -c \
        'import parallel_clip; print(parallel_clip.__path__[0])' 2>/dev/null || true)"
    [ "$installed" = "$PARALLEL_CLIP_ROOT/parallel_clip" ] && return
    echo "Adding parallel_clip to the active environment ($PYTHON); its packages stay as they are."
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
        --editable "$PARALLEL_CLIP_ROOT"
}

_use_own_environment() {
    local missing="$1" venv="${PARALLEL_CLIP_VENV:-$PARALLEL_CLIP_ROOT/.venv}" extras stamp wanted
    shift
    extras="$(IFS=,; echo "$*")"
    stamp="$venv/parallel_clip-${extras:-base}.stamp"
    wanted="$PARALLEL_CLIP_ROOT $(sha256sum <"$PARALLEL_CLIP_ROOT/setup.py")"

    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
            local base
            base="$(_base_interpreter)"
            echo "The active Python lacks: ${missing:-Python 3.11 or later}."
            echo "Making an environment with $("$base" --version) in $venv ..."
            if ! "$base" -m venv "$venv" >/dev/null; then
                echo "error: '$base -m venv' failed; on Debian and Ubuntu, install python3-venv" >&2
                return 1
            fi
        fi
        echo "Installing parallel_clip${extras:+[$extras]} and what it needs: PyTorch and more," \
            "several GB the first time; this takes minutes ..."
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
            --editable "$PARALLEL_CLIP_ROOT${extras:+[$extras]}"
        echo "$wanted" >"$stamp"
        echo "The environment is ready."
    fi
    PYTHON="$venv/bin/python"
}

# The interpreter to make an environment with. It is run, not only looked up: version managers leave
# commands on PATH that end with an error.
_base_interpreter() {
    local candidates="${PYTHON:-python3 python3.12 python3.11}" candidate
    for candidate in $candidates; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
            2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: none of these is Python 3.11 or 3.12: $candidates." \
        "Install one, or name it: PYTHON=/path/to/python3.12" >&2
    return 1
}
