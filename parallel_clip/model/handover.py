"""What one stage of the pipeline hands on to the next: both towers in one flat message.

One message a microbatch means one schedule, with one fill and one drain, for both towers. For each
tower it has the hidden states [S, b, h] that the next stage goes on from; the features [b, D] where
the tower has ended; nothing where it has not started. There are as many texts as pictures, or a
multiple. Shape letters as in layers.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel_clip.model.architecture import Architecture
from parallel_clip.model.towers.transformer import TowerConfig
from parallel_clip.stages.handed_on import Shape, handed_on
from parallel_clip.stages.stage import LayerRange, Stage


@dataclass(frozen=True)
class Handover:
    """The shape of each tower's part; None where there is nothing to hand on."""

    vision: Shape | None
    text: Shape | None

    @property
    def sizes(self) -> list[int]:
        return [prod(shape) for shape in (self.vision, self.text) if shape is not None]

    def pack(
        self,
        vision: Tensor | None,
        text: Tensor | None,
        length: int,
        empty: Tensor | None = None,
    ) -> Tensor:
        """Both parts as one column [length, 1, 1], which megatron-core takes for a sequence of
        `length` tokens of width 1; filled up with zeros. A part that has a shape and is None is
        zeros, too, of the dtype and on the device of `empty`."""
        parts = [
            empty.new_zeros(prod(shape), 1, 1) if part is None else part.reshape(-1, 1, 1)
            for part, shape in ((vision, self.vision), (text, self.text))
            if shape is not None
        ]
        message = torch.cat(parts)
        missing = length - len(message)
        return F.pad(message, (0, 0, 0, 0, 0, missing)) if missing else message

    def unpack(self, message: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The two parts, as views. They come from one split, so that backward makes the message's
        gradient in one piece."""
        used = self.sizes
        parts = iter(message.split([*used, len(message) - sum(used)]))
        vision, text = (
            None if shape is None else next(parts).view(shape) for shape in (self.vision, self.text)
        )
        return vision, text


@dataclass(frozen=True)
class MessageLayout:
    """What the stages of a pipeline hand on, for one model.

    sequence_ranks: over how many ranks sequence parallelism splits the tokens (1: it does not);
    captions: texts of each picture in training.
    """

    architecture: Architecture
    stages: tuple[Stage, ...]
    sequence_ranks: int
    captions: int = 1

    def of(self, stage: Stage, pairs: int, training: bool) -> Handover:
        """What `stage` hands on for a microbatch of `pairs`; in evaluation, of one text each."""

        def shape(held: LayerRange, tower: TowerConfig, count: int) -> Shape | None:
            tokens = tower.training_tokens if training else tower.tokens
            sizes = tokens, tower.width, self.architecture.embed_dim
            return handed_on(held, count, *sizes, self.sequence_ranks)

        texts = pairs * self.captions if training else pairs
        return Handover(
            shape(stage.vision, self.architecture.vision, pairs),
            shape(stage.text, self.architecture.text, texts),
        )

    def length(self, pairs: int, training: bool) -> int:
        """The length of all messages of a pipeline, since megatron-core's schedules know one."""
        sizes = [sum(self.of(stage, pairs, training).sizes) for stage in self.stages[:-1]]
        return max(sizes, default=1)
