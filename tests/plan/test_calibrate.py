"""Calibration: what it writes is a device file, the same on all ranks. Its figures are those of the
machine and are not looked at."""

import pytest

from parallel_clip.config.file import read_yaml, write_yaml
from parallel_clip.engine.groups import Groups
from parallel_clip.engine.launch import Launch
from parallel_clip.errors import InputError
from parallel_clip.layout import Layout
from parallel_clip.plan.calibrate import calibrate, measure_device
from parallel_clip.plan.device_file import device_from_dict

ALONE = Launch(0, 0, 1)


def measure(groups: Groups) -> dict:
    world = groups.layout.world
    return measure_device(groups, Launch(groups.rank, groups.rank, world, world), quick=True)


@pytest.mark.parametrize("world", [1, 2])
def test_what_is_measured_is_a_device_file(processes, world):
    trees = processes.run(Layout(world), measure)
    assert all(tree == trees[0] for tree in trees)
    tree = read_yaml(write_yaml(trees[0]), "written")
    device = device_from_dict(tree, "written")
    assert [size for size, _ in device.fp32.products] == [2 * 64**3, 2 * 128 * 256 * 256]
    assert max(part for _, part in device.fp32.products) <= 1
    assert (device.inside is not None) == (world > 1)
    assert device.between is None, "all processes are on one machine"
    assert f"{world} processes" in device.sources["fp32"]


def test_nothing_is_overwritten(tmp_path):
    path = tmp_path / "device.yaml"
    path.write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        calibrate(path, ALONE)
    assert path.read_text() == "mine"
    with pytest.raises(InputError, match="there is no folder"):
        calibrate(tmp_path / "nowhere" / "device.yaml", ALONE)
