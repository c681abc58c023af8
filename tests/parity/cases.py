"""The runs compared with open_clip: a covering set that always runs, and the whole grid."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import cycle, product
from typing import Any

from tests.parity.models import MODELS, TIMM_MODELS


@dataclass(frozen=True)
class Case:
    """One run. `model` is a name of MODELS; those of SigLIP train with the sigmoid loss."""

    model: str = "plain"
    data: int = 1
    tensor: int = 1
    sequence: bool = False
    microbatches: int = 1
    recompute: str = "none"
    precision: str = "fp32"
    clip_grad_norm: float | None = None
    pipeline: int = 1
    virtual: int = 1
    stash: int | str = "auto"  # microbatches that keep their graphs
    stages: dict[str, list[int]] | None = field(default=None, hash=False)
    pad: bool = False  # for a tensor size that does not divide the model
    freeze: dict[str, Any] | None = field(default=None, hash=False)
    exchange: str = "auto"  # "ring": texts streamed, logits in tiles that do not divide the batch
    updates: str | None = None  # a name of UPDATES: learning rates of parts, and what decays
    ema_every: int = 0  # steps between updates of an average of the weights; 0: none

    @property
    def loss(self) -> str:
        return "sigmoid" if "siglip" in self.model else "infonce"

    @property
    def loss_section(self) -> dict[str, Any]:
        """The `loss` section of the run's config."""
        tile = 3 if self.exchange == "ring" else "auto"
        return {"kind": self.loss, "exchange": self.exchange, "tile": tile}

    @property
    def batch(self) -> int:
        """Pairs in a global batch: so many microbatches must divide it."""
        return 12 if self.microbatches % 3 == 0 else 16

    @property
    def processes(self) -> int:
        return self.data * self.tensor * self.pipeline

    @property
    def parallel(self) -> dict[str, Any]:
        """The `parallel` section of the run's config."""
        return {
            "tensor": self.tensor,
            "pad": self.pad,
            "sequence": self.sequence,
            "pipeline": self.pipeline,
            "virtual_pipeline": self.virtual,
            "stash": self.stash,
            "stages": self.stages,
        }

    def __str__(self) -> str:
        parts = [self.model, f"data{self.data}", f"tensor{self.tensor}{'s' * self.sequence}"]
        parts += ["padded"] if self.pad else []
        if self.pipeline > 1:
            parts += [f"pipeline{self.pipeline}x{self.virtual}", f"stash{self.stash}"]
            parts += ["byhand"] if self.stages else []
        parts += [f"micro{self.microbatches}", self.recompute, self.precision]
        parts += [f"frozen-{words(self.freeze)}"] if self.freeze else []
        parts += ["clipped"] if self.clip_grad_norm else []
        parts += [self.exchange] if self.exchange != "auto" else []
        parts += [self.updates] if self.updates else []
        parts += [f"ema{self.ema_every}"] if self.ema_every else []
        return "-".join(parts)


def words(freeze: dict[str, Any]) -> str:
    """{"vision": {"unlocked_groups": 2, "norms": True}} is "vision2norms"."""
    return "".join(
        f"{tower}{how}"
        if how == "all"
        else f"{tower}{how['unlocked_groups']}{'norms' * how.get('norms', False)}"
        for tower, how in freeze.items()
    )


# Always run: every part of the package once, each in a layout that is awkward for it.
COVERING = [
    Case(data=2, tensor=2, sequence=True, microbatches=4, recompute="selective", exchange="ring"),
    Case("quickgelu-layerscale", tensor=2, microbatches=4, recompute="full", clip_grad_norm=1.0),
    Case("clipa", tensor=2, sequence=True, ema_every=3),
    Case(tensor=2, sequence=True, microbatches=4, precision="bf16"),
    Case("patch-dropout", pipeline=2, microbatches=4, stash=0, ema_every=1),
    Case("uneven", pipeline=3, microbatches=3, stash=1, recompute="full"),
    Case("siglip", data=2, pipeline=2, microbatches=4, stash=4, exchange="ring"),
    Case("uneven", pipeline=2, virtual=2, microbatches=4, stash=2),
    Case("timm-pe-core", tensor=2, pipeline=2, sequence=True, microbatches=2, recompute="full"),
    Case("timm-siglip", tensor=3, sequence=True, microbatches=2, recompute="full", pad=True),
    Case(
        "uneven",
        tensor=2,
        sequence=True,
        pipeline=2,
        microbatches=4,
        stash=1,
        recompute="full",
        freeze={"vision": {"unlocked_groups": 3}, "text": {"unlocked_groups": 1, "norms": True}},
    ),
    Case("uneven", data=2, pipeline=2, microbatches=2, updates="embeddings-spared"),
]
# Likewise, where there is more time.
COVERING_MORE = [
    Case(ema_every=1),
    Case("patch-dropout", tensor=2, sequence=True, microbatches=4),
    Case("three-heads", tensor=3, sequence=True, microbatches=4),
    Case("siglip", data=2, microbatches=4, ema_every=1),
    Case(pipeline=4, microbatches=4, clip_grad_norm=1.0),
    Case("uneven", tensor=2, sequence=True, pipeline=2, microbatches=1, recompute="selective"),
    Case(pipeline=2, virtual=2, microbatches=2, precision="bf16"),
    Case("timm-siglip", tensor=2, sequence=True, microbatches=2, recompute="selective"),
    Case("timm-mobile-clip", data=2, pipeline=2, microbatches=2, stash=2),
    Case("three-heads", data=2, tensor=2, sequence=True, clip_grad_norm=1.0, pad=True),
    Case(data=2, pipeline=2, microbatches=2, stash=0, freeze={"vision": "all"}),
    Case("timm-pe-core", tensor=2, sequence=True, updates="patterns-spared"),
]

# What of the towers is not trained.
FREEZES = [
    {"vision": "all"},
    {"text": "all"},
    {"vision": "all", "text": "all"},
    {"vision": {"unlocked_groups": 1}},
    {"vision": {"unlocked_groups": 2, "norms": True}, "text": {"unlocked_groups": 2}},
    {"vision": {"unlocked_groups": 3}, "text": {"unlocked_groups": 0, "norms": True}},
]

#          data, tensor, sequence
LAYOUTS = [(1, 1, False), (2, 1, False), (1, 2, False), (1, 2, True), (2, 2, True)]


def grid() -> list[Case]:
    recomputes = ("none", "selective", "full")
    cases = [
        *COVERING_MORE,
        *(
            Case("plain", *layout, microbatches, recompute, precision)
            for layout, microbatches, recompute, precision in product(
                LAYOUTS, (1, 4), recomputes, ("fp32", "bf16")
            )
        ),
    ]
    cases += [
        Case("siglip", *layout, microbatches, precision=precision)
        for layout, microbatches, precision in product(LAYOUTS, (1, 4), ("fp32", "bf16"))
    ]
    cases += [
        Case(model, *layout, microbatches, recompute)
        for model, layout, (microbatches, recompute) in product(
            MODELS,
            [(1, 2, False), (1, 2, True), (2, 2, True)],
            [(1, "none"), (4, "selective"), (4, "full")],
        )
        if model not in ("three-heads", *TIMM_MODELS)
    ]
    cases += [
        Case(model, 1, 3, sequence, microbatches, recompute)
        for model, sequence, (microbatches, recompute) in product(
            ("three-heads", "six-heads"), (False, True), [(1, "none"), (4, "full")]
        )
    ]
    cases += _pipelines()
    cases += [
        Case(model, *layout, microbatches, pipeline=pipeline, precision=precision)
        for model in TIMM_MODELS
        for (*layout, pipeline), (microbatches, precision) in product(
            [
                (1, 1, False, 1),
                (2, 1, False, 1),
                (1, 2, True, 1),
                (1, 1, False, 2),
                (1, 4, True, 1),
            ],
            [(1, "fp32"), (4, "fp32"), (2, "bf16")],
        )
    ]
    cases += [
        replace(case, exchange=exchange)
        for case in cases
        for exchange in ("gather", "ring")
        if case.recompute == "none" and case.precision == "fp32"
    ]
    cases += _padded()
    cases += _frozen()
    cases += [
        Case(model, *layout, pipeline=pipeline, updates=updates)
        for model, (*layout, pipeline), updates in product(
            ("uneven", "siglip", "timm-siglip", "timm-pe-core"),
            [(1, 1, False, 1), (2, 1, False, 1), (1, 2, True, 1), (1, 1, False, 2)],
            ("embeddings-spared", "patterns-spared"),
        )
    ]
    cases.append(Case("uneven", data=2, precision="bf16", updates="embeddings-spared"))
    cases += [
        Case(model, *layout, 2, pipeline=pipeline, ema_every=every)
        for model, (*layout, pipeline), every in product(
            ("plain", "siglip"),
            [(1, 1, False, 1), (2, 1, False, 1), (1, 2, True, 1), (1, 1, False, 2)],
            (1, 3),
        )
    ]
    cases.append(Case(data=2, microbatches=2, precision="bf16", ema_every=3))
    cases += [
        Case("uneven", pipeline=pipeline, microbatches=2, freeze={"vision": "all"}, ema_every=1)
        for pipeline in (1, 2)
    ]
    return [case for case in dict.fromkeys(cases) if case not in COVERING]


#             data, tensor, sequence, pipeline, virtual
PIPELINES = [
    (1, 1, False, 2, 1), (1, 1, False, 3, 1), (1, 1, False, 4, 1), (2, 1, False, 2, 1),
    (1, 2, True, 2, 1), (2, 2, True, 2, 1), (1, 1, False, 2, 2), (1, 2, False, 3, 1),
]  # fmt: skip


def _pipelines() -> list[Case]:
    """Numbers of microbatches that the stages divide and that they do not; each schedule."""
    cases = []
    for data, tensor, sequence, pipeline, virtual in PIPELINES:
        layout = {
            "data": data, "tensor": tensor, "sequence": sequence,
            "pipeline": pipeline, "virtual": virtual,
        }  # fmt: skip
        multiple, odd = (3, 4) if pipeline == 3 else (4, 3)
        if data == 2:
            odd = 1  # a data rank's share of 12 pairs is 6, and of 16 it is 8
        ways = [(multiple, 0, "none"), (multiple, 1, "selective"), (multiple, multiple, "full")]
        ways += [(odd, 0, "full"), (odd, odd, "none")] if odd >= pipeline * (virtual > 1) else []
        cases += [
            Case(model, microbatches=microbatches, stash=stash, recompute=recompute, **layout)
            for model, (microbatches, stash, recompute) in product(
                ("patch-dropout", "uneven"), ways
            )
        ]
        cases.append(Case("siglip", microbatches=multiple, stash=0, **layout))
        cases.append(Case("uneven", microbatches=multiple, precision="bf16", **layout))
    manual_split = {"vision": [2, 3, 0], "text": [0, 1, 1]}
    cases.append(Case("uneven", pipeline=3, microbatches=3, stash=0, stages=manual_split))
    return cases


def _padded() -> list[Case]:
    """Tensor sizes that divide neither heads nor, for some, the MLP."""
    sizes = dict.fromkeys(MODELS, 3) | {"three-heads": 2, "six-heads": 4}
    cases = [
        Case(model, 1, tensor, sequence, microbatches, recompute, precision, pad=True)
        for (model, tensor), (sequence, microbatches, recompute, precision) in product(
            sizes.items(),
            [
                (False, 1, "none", "fp32"),
                (True, 4, "selective", "fp32"),
                (True, 4, "full", "fp32"),
                (True, 4, "none", "bf16"),
            ],
        )
    ]
    cases += [
        Case("three-heads", tensor=4, pad=True),  # more ranks than heads
        Case("three-heads", tensor=2, pipeline=2, microbatches=4, stash=1, pad=True),
        Case("quickgelu-layerscale", tensor=3, sequence=True, clip_grad_norm=1.0, pad=True),
    ]
    return cases


def _frozen() -> list[Case]:
    #          data, tensor, sequence, pipeline, virtual
    layouts = [(1, 1, False, 1, 1), (2, 1, False, 1, 1), (1, 2, True, 1, 1), (1, 1, False, 2, 1)]
    layouts += [(2, 1, False, 2, 1), (1, 2, True, 2, 1), (1, 1, False, 2, 2)]
    ways = cycle([(2, 0, "none"), (4, 2, "full"), (4, 4, "selective"), (4, 0, "selective")])
    return [
        Case(
            model,
            data,
            tensor,
            sequence,
            microbatches,
            recompute,
            pipeline=pipeline,
            virtual=virtual,
            stash=stash,
            freeze=freeze,
        )
        for model, freeze, (data, tensor, sequence, pipeline, virtual) in product(
            ("uneven", "timm-siglip", "timm-pe-core"), FREEZES, layouts
        )
        for microbatches, stash, recompute in [next(ways)]
    ]
