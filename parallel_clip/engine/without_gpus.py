"""Call a function in a process of its own that sees no GPU.

A process that has once asked for a GPU keeps memory on it until it ends.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any


def call_without_gpus(function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)`, both of which can be pickled; takes the time of importing torch.

    Raises:
        Exception: what the function raises. RuntimeError: the process ended before it had answered.
    """
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=pickle.dumps((function, arguments)),
        capture_output=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace")
        raise RuntimeError(f"a process without GPUs ended with {done.returncode}:\n{said}")
    result, error = pickle.loads(done.stdout)
    if error is not None:
        raise error
    return result


def _answer() -> None:
    """In the other process: read the call from standard input and write its outcome to standard
    output, on which nothing else is printed."""
    with os.fdopen(os.dup(1), "wb") as output:
        os.dup2(2, 1)
        try:
            function, arguments = pickle.load(sys.stdin.buffer)
            outcome = function(*arguments), None
        except Exception as error:
            outcome = None, error
        output.write(pickle.dumps(outcome))


if __name__ == "__main__":
    _answer()
