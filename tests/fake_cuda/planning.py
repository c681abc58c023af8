"""Plans a small run where torch believes in a GPU, and prints what that chose and touched.

python -m tests.fake_cuda.planning FOLDER
"""

import json
import sys
from pathlib import Path

import torch

from parallel_clip.plan.report import dry_run_report
from tests.plan.small_plans import small_config, small_plan

if __name__ == "__main__":
    assert torch.cuda.is_available(), "to be run with the stubs, see build.py"
    folder = Path(sys.argv[1])
    report = dry_run_report(small_config(folder, 4), world_size=1)
    touched = torch.cuda.is_initialized()
    plan = small_plan(folder, 4)
    print(
        json.dumps(
            {
                "report": report,
                "dry_run_touched_it": touched,
                "stash": plan.layout_plan.stash,
                "saved": plan.memory[0].saved,
                "notes": plan.notes,
                "predicted": plan.prediction.tree(),
            }
        )
    )
