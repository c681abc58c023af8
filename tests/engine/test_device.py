"""The CPU seam leaves what is not CUDA's business as torch has it."""

import subprocess
import sys

import pytest
import torch

SCRIPT = """
import torch
from parallel_clip.engine.device import prepare_device

prepare_device(0)
assert torch.zeros(2, device="cuda").device.type == "cpu"
assert torch.empty(2).cuda().device.type == "cpu"
with torch.device("meta"):
    assert torch.empty(2).device.type == "meta"
    assert torch.nn.Linear(2, 2).weight.device.type == "meta"
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is no seam where CUDA is")
def test_cuda_means_cpu_and_meta_stays_meta():
    """In a process of its own: elsewhere torch may have looked its factories up already."""
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=120)
