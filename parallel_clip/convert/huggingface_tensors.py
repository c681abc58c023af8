"""Tensors of Hugging Face's to OpenCLIP's and back, by the lines of a table of names, exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from parallel_clip.convert.huggingface_names import Line, Shape

Read = Callable[[str], Tensor]


def read_ours(line: Line, name: str, shapes: Mapping[str, Shape], read: Read) -> Tensor:
    """OpenCLIP's tensor `name`, one of `line.ours`. shapes: OpenCLIP's by name; read: gives one of
    Hugging Face's by name."""
    if line.form == "rows":
        before = line.ours[: line.ours.index(name)]
        joined = _joined(line.theirs, read)
        if len(line.ours) == 1:
            return joined
        return joined.narrow(0, sum(shapes[n][0] for n in before), shapes[name][0])
    tensor = read(line.theirs[0])
    return tensor.t() if line.form == "transposed" else tensor.reshape(shapes[name])


def read_theirs(line: Line, read: Read) -> Iterator[Tensor]:
    """Hugging Face's tensors of a line, in order. read: gives one of OpenCLIP's by name."""
    if line.form == "rows":
        joined = _joined(line.ours, read)
        yield from joined.chunk(len(line.theirs)) if len(line.theirs) > 1 else [joined]
    else:
        tensor = read(line.ours[0])
        yield tensor.t() if line.form == "transposed" else tensor.reshape(line.shape)


def _joined(names: Sequence[str], read: Read) -> Tensor:
    return read(names[0]) if len(names) == 1 else torch.cat([read(name) for name in names])
