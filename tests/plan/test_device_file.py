"""Device files: those that come with the package, and what is said of wrong ones."""

import pytest

from parallel_clip.errors import InputError
from parallel_clip.plan.device_file import (
    device_from_dict,
    device_names,
    device_of_gpu,
    read_device,
)
from tests.plan.ideal_device import IDEAL

SOURCES = {key: "made up" for key in IDEAL if key != "name"}


def complaint(changes: dict, sources: dict = SOURCES) -> str:
    with pytest.raises(InputError) as caught:
        device_from_dict(IDEAL | changes | {"sources": sources}, "gpu.yaml")
    return str(caught.value)


def test_gpus_are_known_by_name():
    assert device_names() == ["a100", "b200", "h100", "h200"]
    for name in device_names():
        device = read_device(name)
        assert name.upper() in device.name
        assert device == read_device(name.upper())
        assert device.precision("bf16").peak > device.precision("fp32").peak


def test_data_sheets():
    """Dense bf16 FLOPs a second and bytes a second of the data sheets (NVIDIA, SXM)."""
    found = {n: (d.bf16.peak, d.memory_bandwidth) for n in device_names() for d in [read_device(n)]}
    assert found == {
        "a100": (312e12, 2.039e12),
        "h100": (989e12, 3.35e12),
        "h200": (989e12, 4.8e12),
        "b200": (2250e12, 8e12),
    }


def test_an_own_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: [")
    with pytest.raises(InputError, match=r"mine\.yaml, line 1, column \d+: not valid YAML"):
        read_device(path)
    path.write_text("80e9")
    with pytest.raises(InputError, match="is a mapping of keys"):
        read_device(path)


def test_no_such_device(tmp_path):
    with pytest.raises(InputError) as caught:
        read_device("h300")
    assert "known GPUs a100, b200, h100, h200" in str(caught.value)
    assert "--calibrate" in str(caught.value)
    with pytest.raises(InputError, match="no file of this name"):
        read_device(tmp_path)


def test_wrong_figures_are_named():
    assert "did you mean streamed?" in complaint({"streamd": 0.8})
    assert "did you mean latency?" in complaint({"inside": IDEAL["inside"] | {"latencies": 1}})
    assert "streamed is 1.5: input should be less than or equal to 1" in complaint(
        {"streamed": 1.5}
    )
    without_peak = {"products": [[1.0, 1.0]], "attention": [[1, 1, 1]]}
    assert "fp32.peak is missing" in complaint({"fp32": without_peak})
    descending = IDEAL["fp32"] | {"products": [[2.0, 0.5], [1.0, 0.4]]}
    assert "sizes of products must ascend" in complaint({"fp32": descending})
    missing = {key: value for key, value in SOURCES.items() if key not in ("inside", "bf16")}
    assert "sources says nothing of bf16, inside" in complaint({}, missing)
    several = complaint({"streamed": 0, "overhead": 0.5})
    assert several.startswith("gpu.yaml has 2 problems:\n- streamed is 0:")


def test_a_precision_that_is_not_there():
    device = device_from_dict(IDEAL | {"bf16": None, "sources": SOURCES}, "gpu.yaml")
    assert device.precision("fp32").peak
    with pytest.raises(InputError, match="no figures for precision bf16; add a section bf16"):
        device.precision("bf16")


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_device_of_a_gpu_by_what_torch_calls_it(gpu, name):
    assert device_of_gpu(gpu) == (read_device(name) if name else None)
