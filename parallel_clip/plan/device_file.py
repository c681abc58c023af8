"""What a device can do: the figures that the time of a step is predicted from, in a YAML file.

Figures of GPUs that can be asked for by name are in `devices/`, each with its source. Those of the
machine at hand are measured by `calibrate.py`. Bytes, FLOPs (two to a multiply-add) and seconds
throughout.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from parallel_clip.config.file import read_yaml
from parallel_clip.errors import InputError

DEVICES = Path(__file__).parent / "devices"

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Link(_Section):
    """Between two GPUs. bandwidth: bytes a second in one direction, all links of a GPU together;
    reached: the part of it that collectives of megabytes reach; latency: seconds of a message."""

    bandwidth: Positive
    reached: Share
    latency: Positive


class Precision(_Section):
    """Arithmetic in one number format.

    peak: FLOPs a second; products: (FLOPs of a matrix product, the part of the peak that it
    reaches), ascending; attention: (tokens, the part of the peak that attention over so many
    reaches forward, and backward), ascending. FLOPs of attention are counted as `block_units` in
    stages/costs.py counts them, 4s² a channel, and twice as many backward.
    """

    peak: Positive
    products: tuple[tuple[Positive, Share], ...] = Field(min_length=1)
    attention: tuple[tuple[Positive, Share, Share], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _ascending(self) -> Precision:
        for name in ("products", "attention"):
            sizes = [point[0] for point in getattr(self, name)]
            if sizes != sorted(set(sizes)):
                raise ValueError(f"the sizes of {name} must ascend")
        return self


class Device(_Section):
    """A GPU or CPU and its links.

    memory: bytes; None: not said. memory_bandwidth: bytes a second, reads and writes together;
    streamed: the part of it that copies, sums and norms reach; activated: the part that activation
    functions and exponentials reach. operation_seconds: of the host, to start one operation.
    inside: between GPUs of a node; between: of different nodes; None: not known. overhead: what a
    step takes as a multiple of what its kernels take by themselves, from a measured step. sources:
    where each figure is from, by key.
    """

    name: str
    memory: Positive | None = None
    memory_bandwidth: Positive
    streamed: Share
    activated: Share
    operation_seconds: Positive
    bf16: Precision | None = None
    fp32: Precision
    inside: Link | None = None
    between: Link | None = None
    overhead: Annotated[float, Field(ge=1)] = 1.0
    sources: dict[str, str]

    @model_validator(mode="after")
    def _has_sources(self) -> Device:
        given = self.model_dump(exclude={"name", "sources"}, exclude_none=True, exclude_unset=True)
        without = [key for key in given if key not in self.sources]
        if without:
            raise ValueError(f"sources says nothing of {', '.join(without)}")
        return self

    def __hash__(self) -> int:  # the mapping of sources has none
        return hash((self.name, self.memory_bandwidth, self.fp32.peak, self.overhead))

    def precision(self, name: str) -> Precision:
        """Its arithmetic in `name`, fp32 or bf16.

        Raises:
            InputError: the file has no figures for it.
        """
        found = {"bf16": self.bf16, "fp32": self.fp32}[name]
        if found is None:
            raise InputError(
                f"the device file of {self.name} has no figures for precision {name}; add a "
                f"section {name} (`parallel-clip plan --calibrate FILE` measures one), or set "
                "precision to fp32"
            )
        return found


def device_names() -> list[str]:
    """The devices that can be asked for by name."""
    return sorted(path.stem for path in DEVICES.glob("*.yaml"))


def device_of_gpu(gpu: str) -> Device | None:
    """The device whose figures are those of a GPU, such as 'NVIDIA H100 80GB HBM3'; None where
    there is none: the files are of SXM modules, and others of a name are slower."""
    words = re.split(r"[^a-z0-9]+", gpu.lower())
    names = [name for name in device_names() if name in words]
    if not names or {"pcie", "nvl", "mig"} & set(words):
        return None
    return read_device(names[0])


def read_device(name_or_path: str | Path) -> Device:
    """The device of a name, such as h100, or of a YAML file.

    Raises:
        InputError: there is neither, or the file is not as it should be; with every problem.
    """
    known = DEVICES / f"{str(name_or_path).lower()}.yaml"
    path = known if known.is_file() else Path(name_or_path)
    if not path.is_file():
        names = ", ".join(device_names())
        raise InputError(
            f"device {name_or_path}: no file of this name, nor one of the known GPUs {names}; "
            "`parallel-clip plan --calibrate FILE` measures this machine and writes such a file"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"cannot read the device file {path}: {reason}") from None
    tree = read_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise InputError(f"{path}: a device file is a mapping of keys such as 'name: my GPU'")
    return device_from_dict(tree, str(path))


def device_from_dict(tree: dict[str, Any], origin: str) -> Device:
    """Check what a device file says; `origin` names it in messages.

    Raises:
        InputError: with every problem.
    """
    try:
        return Device.model_validate(tree)
    except ValidationError as error:
        problems = [_problem(detail) for detail in error.errors(include_url=False)]
    if len(problems) == 1:
        raise InputError(f"{origin}: {problems[0]}")
    raise InputError("\n- ".join([f"{origin} has {len(problems)} problems:", *problems]))


def _problem(detail: dict[str, Any]) -> str:
    *above, last = detail["loc"] or ("the file",)
    path = ".".join(str(step) for step in detail["loc"])
    if detail["type"] == "missing":
        return f"{path} is missing"
    if detail["type"] == "extra_forbidden":
        section = {"inside": Link, "between": Link, "bf16": Precision, "fp32": Precision}
        fields = (section[above[0]] if above else Device).model_fields
        nearest = difflib.get_close_matches(str(last), fields, 1, cutoff=0) or [*fields]
        return f"unknown key {path}; did you mean {nearest[0]}?"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path} is {detail['input']!r}: {message[0].lower()}{message[1:]}"
