"""`status.json`: how a run stands, for schedulers: torchrun turns every exit code into 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from parallel_clip.checkpoint import durable
from parallel_clip.checkpoint.manifest import utc_now
from parallel_clip.errors import BadDataError, BadStepsError, SaveFailedError

STATUS_FILE = "status.json"

State = Literal["running", "finished", "stopped", "failed"]


def write_status(run_dir: Path, state: State, step: int, reason: str | None = None) -> None:
    """Replace the status of a run. step: optimizer steps done; reason: of a stop or a failure, one
    of the kinds in docs/reliability.md, a colon, and words."""
    status = {
        "state": state,
        "step": step,
        "reason": reason,
        "time": utc_now(),
    }
    durable.replace_text(run_dir / STATUS_FILE, json.dumps(status) + "\n")


def read_status(run_dir: Path) -> dict | None:
    try:
        return json.loads((run_dir / STATUS_FILE).read_text())
    except (OSError, ValueError):
        return None


def write_failure(run_dir: Path, step: int, error: BaseException) -> None:
    """Note why a run failed, unless the rank that failed first has noted it: what the others see
    after it is that it is gone. Cannot fail itself: the disk may be what failed."""
    kinds = {BadDataError: "bad_data", BadStepsError: "bad_steps", SaveFailedError: "save_failed"}
    kind = next((name for kind, name in kinds.items() if isinstance(error, kind)), "error")
    before = read_status(run_dir)
    if before is not None and before.get("state") == "failed" and kind == "error":
        return
    words = " ".join(str(error).split())[:500] or type(error).__name__
    try:
        write_status(run_dir, "failed", step, f"{kind}: {words}")
    except OSError:
        return
