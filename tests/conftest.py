"""Settings of the whole suite."""

import os
import re
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.processes import Processes

# The same examples on every run, and no verdict that hangs on the speed of the machine.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


# On a machine with GPUs, too, everything but tests/gpu runs on the CPU. The word by itself: a file
# may have it in its name.
if not any("gpu" in re.split(r"\W+", argument) for argument in sys.argv[1:]):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    # `--rehearse` is an option of tests/gpu alone.
    if item.get_closest_marker("gpu") and not item.config.getoption("--rehearse", default=False):
        import torch  # here, so that tests of the pure modules start at once

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="module", autouse=True)
def leave_no_process_group() -> Iterator[None]:
    """An encoder that a test loads joins a world of one, in which the tests of another file, and
    the processes that they fork, would find themselves."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        from parallel_clip.engine.groups import close_groups

        close_groups()


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Real processes to run cases on; started when a test first asks for them."""
    pool = Processes()
    yield pool
    pool.close()
