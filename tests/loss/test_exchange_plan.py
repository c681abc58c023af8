"""The sizes of a loss are arithmetic that a planner can ask for without torch."""

import subprocess
import sys


def test_it_is_imported_without_torch():
    code = "import sys, parallel_clip.loss.exchange_plan; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


def test_the_package_knows_its_names_and_no_others():
    code = "import parallel_clip.loss as loss; loss.ClipLoss, loss.SigLipLoss, loss.Loss"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "module 'parallel_clip.loss' has no attribute 'Loss'" in result.stderr
