"""Which layers of both towers lie on which stage of a pipeline.

Each tower's layers are dealt in order, to consecutive stages: its embedding goes with its first
layer, its pooling, final norm and projection with its last. The vision tower begins on the first
stage, which reads the pictures; the text tower may begin later, and either may end early: its
features are then handed on. Every stage holds a layer of some tower. The logit scale and bias are
the last stage's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

from parallel_clip.errors import InputError
from parallel_clip.stages.costs import ModelCosts, TowerCosts
from parallel_clip.stages.stage import LayerRange, Stage

if TYPE_CHECKING:
    from parallel_clip.config import Stages

# What evenness may cost: within so much of the least, layers are dealt as people would deal them,
# and not 17, 14, 17 for a gain that no clock would show.
COST_TOLERANCE = 0.02

# FLOPs, forward and backward, of a tower's layers [first, stop), for 0 ≤ first ≤ stop ≤ total
_RangeCosts = dict[tuple[int, int], int]


class LayerSplit(NamedTuple):
    """Layers on each stage; what `parallel.stages` is in a config."""

    vision: Sequence[int]
    text: Sequence[int]

    def __str__(self) -> str:
        return f"{{vision: {list(self.vision)}, text: {list(self.text)}}}"


def partition(
    costs: ModelCosts, pipeline: int, virtual: int = 1, manual_split: Stages | None = None
) -> tuple[Stage, ...]:
    """The `pipeline` × `virtual` stages in the order in which data pass through them.

    Args:
        manual_split: numbers of layers for each stage in order; None: balanced by cost.

    Raises:
        InputError: there are more stages than layers, or `manual_split` does not fit the model.
    """
    count = pipeline * virtual
    _check_count(costs, pipeline, virtual)
    if manual_split is None:
        split = balanced_split(costs, count)
    else:
        split = LayerSplit(manual_split.vision, manual_split.text)
        for problem in _problems(split, costs, pipeline, virtual):
            balanced = balanced_split(costs, count)
            raise InputError(f"{problem}; balanced by cost it is {balanced}, as with null")
    vision = _ranges(split.vision, costs.vision.layers)
    text = _ranges(split.text, costs.text.layers)
    return tuple(Stage(n, count, v, t) for n, (v, t) in enumerate(zip(vision, text, strict=True)))


def chunks_of(stages: Sequence[Stage], pipeline: int, pipeline_rank: int) -> list[Stage]:
    """The stages that lie on one pipeline rank: chunk v is stage v × pipeline + rank, Megatron's
    interleaving (Narayanan et al., arXiv 2104.04473, section 2.2)."""
    return list(stages[pipeline_rank::pipeline])


def _ranges(counts: Iterable[int], total: int) -> list[LayerRange]:
    bounds = accumulate(counts, initial=0)
    return [LayerRange(first, stop, total) for first, stop in pairwise(bounds)]


@cache  # a search over layouts asks for the same few again and again
def balanced_split(costs: ModelCosts, count: int) -> LayerSplit:
    """The most even split whose slowest stage costs at most `COST_TOLERANCE` above the minimum.

    Evenest: the least sum of squared costs of each tower on each stage; of equals, the fewest
    (vision, then text) layers on the first stage, on the second, and so on, because early stages
    keep the activations of more microbatches. Bounds on the cost of a stage are tried from the
    least that could do; the least that does is soon found, since costs are close together and
    splits many.
    """
    vision, text = _range_costs(costs.vision), _range_costs(costs.text)
    whole = vision[0, costs.vision.layers] + text[0, costs.text.layers]
    sums = {v + t for v in vision.values() for t in text.values()}
    bounds = sorted(cost for cost in sums if cost * count >= whole)
    least = next(bound for bound in bounds if min_variance_split(vision, text, count, bound))
    return min_variance_split(vision, text, count, least + int(COST_TOLERANCE * least))


def min_variance_split(
    vision: _RangeCosts, text: _RangeCosts, count: int, bound: int
) -> LayerSplit | None:
    """The split of least squared costs among those in which no stage costs more than `bound`; None
    where there is none.

    A dynamic program over (stage, layers dealt of each tower). The bound keeps its states few:
    where too little has been dealt, the stages to come cannot hold the rest.
    """
    vision_layers, text_layers = max(vision)[1], max(text)[1]

    @cache
    def rest(stage: int, v: int, t: int) -> tuple[int, tuple[tuple[int, int], ...]] | None:
        """Squared costs and layers of the stages from `stage` on, `v` and `t` layers being dealt
        already; None: it cannot be done."""
        left = count - stage
        if vision[v, vision_layers] + text[t, text_layers] > left * bound:
            return None
        if vision_layers - v + text_layers - t < left:
            return None
        if left == 0:
            return 0, ()
        found = []
        for next_v in _stops(v, vision_layers, may_wait=False):
            if vision[v, next_v] > bound:
                break
            for next_t in _stops(t, text_layers, may_wait=True):
                if vision[v, next_v] + text[t, next_t] > bound:
                    break
                behind = (next_v, next_t) != (v, t) and rest(stage + 1, next_v, next_t)
                if behind:
                    layers = (next_v - v, next_t - t)
                    squares = vision[v, next_v] ** 2 + text[t, next_t] ** 2
                    found.append((squares + behind[0], (layers, *behind[1])))
        return min(found, default=None)

    best = rest(0, 0, 0)
    return best and LayerSplit(*zip(*best[1], strict=True))


def _stops(dealt: int, total: int, may_wait: bool) -> range:
    """How many layers of a tower may be dealt after the next stage."""
    may_get_none = dealt == total or (dealt == 0 and may_wait)
    return range(dealt if may_get_none else dealt + 1, total + 1)


def _range_costs(costs: TowerCosts) -> _RangeCosts:
    total = costs.layers
    ranges = (LayerRange(a, b, total) for a in range(total + 1) for b in range(a, total + 1))
    return {(held.first, held.stop): costs.of(held) + costs.backward(held) for held in ranges}


def _check_count(costs: ModelCosts, pipeline: int, virtual: int) -> None:
    layers = costs.vision.layers + costs.text.layers
    if pipeline * virtual <= layers:
        return
    ways = []
    if layers // virtual >= min(virtual, 2):
        ways.append(f"parallel.pipeline to at most {layers // virtual}")
    if virtual > 1 and layers >= pipeline:
        ways.append(f"parallel.virtual_pipeline to at most {layers // pipeline}")
    remedy = " or ".join(ways) or f"their product to at most {layers}"
    raise InputError(
        f"{_in_words(pipeline, virtual)} are more than the {layers} layers of "
        f"{costs.name} (vision {costs.vision.layers} + text {costs.text.layers}); set {remedy}"
    )


def _problems(split: LayerSplit, costs: ModelCosts, pipeline: int, virtual: int) -> Iterator[str]:
    """What is wrong with a manual split; a problem makes no sense before those above are gone."""
    vision, text = list(split.vision), list(split.text)
    towers = ("vision", vision, costs.vision.layers), ("text", text, costs.text.layers)
    for tower, counts, total in towers:
        given = f"parallel.stages.{tower} {counts}"
        if len(counts) != pipeline * virtual:
            yield f"{given} has {len(counts)} numbers for {_in_words(pipeline, virtual)}"
        if min(counts) < 0:
            yield f"{given} has a number below 0"
        if sum(counts) != total:
            yield (
                f"{given} deals {sum(counts)} layers and the {tower} tower of {costs.name} "
                f"has {total}"
            )
        held = [stage for stage, layers in enumerate(counts) if layers]
        for stage in range(held[0], held[-1]):
            if not counts[stage]:
                yield (
                    f"{given} leaves out stage {stage}, counted from 0, between others; "
                    "a tower lies on stages in a row"
                )
    if vision[0] == 0:
        yield (
            f"parallel.stages.vision {vision} has no layer on the first stage, which reads the "
            "pictures"
        )
    for stage, layers in enumerate(zip(vision, text, strict=True)):
        if layers == (0, 0):
            yield f"parallel.stages leaves stage {stage}, counted from 0, without a layer"


def _in_words(pipeline: int, virtual: int) -> str:
    if virtual == 1:
        return f"the {pipeline} stages of parallel.pipeline"
    return (
        f"parallel.pipeline {pipeline} × parallel.virtual_pipeline {virtual} = "
        f"{pipeline * virtual} stages"
    )
