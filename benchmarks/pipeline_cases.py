"""What benchmarks/pipeline.py measures, and the least that each case could take."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from simulated_stages import Case, Step
from tower_comparison import CostsInTurns, orders_in_turns

from parallel_clip.model.known_models import load_architecture
from parallel_clip.pipeline.orders import PipelineOp, step_orders
from parallel_clip.pipeline.timeline import Costs, Timeline, ideal_step_seconds, simulate
from parallel_clip.stages.costs import TowerCosts
from parallel_clip.stages.partition import partition
from parallel_clip.stages.stage import LayerRange

FORWARD = (
    0.16  # seconds of a rank's forward: messages and Python, 1 to 3 ms an op, are small beside
)
BAR = 0.03

TWO_PASS, STASH = "two passes", "some microbatches keep their graphs"
INTERLEAVED, UNEVEN = "interleaved, 2 stages a rank", "uneven stages"
TOWERS = "both towers in one pipeline, or in turns"
REAL = "a small real model: says nothing of more stages than the machine has cores"

MODELS = [("ViT-L-14", 3, 8), ("ViT-H-14", 3, 8), ("ViT-B-16", 8, 16)]  # ranks, microbatches
DRAWN = (4, 8)  # ranks, microbatches of the timelines


@dataclass(frozen=True)
class Plan:
    """A case, the table that it is shown in, and under what name."""

    table: str
    name: str
    case: Case
    has_bar: bool = True


@dataclass(frozen=True)
class Row:
    """The step shown of those measured; `ideal` is the least time for its own ops, in seconds."""

    plan: Plan
    step: Step
    ideal: float

    @property
    def overhead(self) -> float:
        return self.step.total / self.ideal - 1

    @property
    def formula(self) -> float | None:
        return formula_seconds(self.plan.case)

    @property
    def busy(self) -> float:
        """Seconds in which a rank computes, on average."""
        spans = self.step.spans
        return sum(span.end - span.start for span in spans) / self.plan.case.ranks

    @property
    def compute(self) -> float | None:
        """`busy` as a multiple of one forward and one backward of each microbatch."""
        case = self.plan.case
        if case.towers is None:
            return None
        asked = sum(sum(costs.forward) + sum(costs.backward) for costs in case.towers)
        return self.busy * case.ranks / (case.microbatches * asked)

    @property
    def overslept(self) -> float | None:
        """How much longer the stages slept than asked, as a share: a busy machine wakes them late.

        Backward takes two forwards, so a forward for the second time is a third of the work.
        """
        if self.compute is None:
            return None
        case = self.plan.case
        return self.compute / (1 + (1 - case.stash / case.microbatches) / 3) - 1

    @property
    def missed(self) -> bool:
        return self.plan.has_bar and self.overhead > BAR

    def as_dict(self) -> dict[str, Any]:
        return {
            "table": self.plan.table,
            "name": self.plan.name,
            "case": dataclasses.asdict(self.plan.case),
            "seconds": self.step.total,
            "ideal_seconds": self.ideal,
            "formula_seconds": self.formula,
            "overhead": self.overhead,
            "busy_seconds": self.busy,
            "compute": self.compute,
            "overslept": self.overslept,
            "waiting": 1 - self.busy / self.step.total,
        }


# ------------------------------------------------------------------------------- what is measured


def quick_plans() -> list[Plan]:
    return [
        Plan(STASH, "", Case(2, 3, 1, towers=_equal(2, forward=0.01))),
        Plan(INTERLEAVED, "", Case(2, 2, 0, 2, towers=_equal(2, 2, forward=0.01))),
    ]


def all_plans() -> list[Plan]:
    sizes = [(2, 4), (2, 8), (3, 8), (4, 4), (4, 6), (4, 8), (4, 16), (8, 8)]
    plans = [Plan(TWO_PASS, "", Case(p, m, towers=_equal(p))) for p, m in sizes]
    plans += [
        Plan(STASH, "", Case(p, m, stash, towers=_equal(p)))
        for p, m, stash in [(2, 8, 8), (3, 8, 8), (4, 8, 2), (4, 8, 4), (4, 8, 6), (4, 8, 8)]
    ]
    plans += [
        Plan(
            INTERLEAVED,
            "p2p overlap" * overlap,
            Case(p, 8, stash, 2, towers=_equal(p, 2), overlap=overlap),
        )
        for p, stash, overlap in [
            (2, 0, False), (4, 0, False), (4, 4, False), (4, 8, False), (4, 0, True), (4, 8, True)
        ]
    ]  # fmt: skip
    plans += [
        Plan(UNEVEN, f"{_in_ms(costs)} ms", Case(3, 8, stash, towers=(costs,)))
        for costs in (_costs([0.06, 0.12, 0.09]), _costs([0.12, 0.06, 0.09]))
        for stash in (0, 4)
    ]
    for name, ranks, microbatches in MODELS:
        fused, separate = tower_costs(name, ranks, microbatches)
        plans += [
            Plan(TOWERS, f"{name}, one", Case(ranks, microbatches, towers=fused)),
            Plan(TOWERS, f"{name}, turns", Case(ranks, microbatches, towers=separate), False),
        ]
    return plans + [Plan(REAL, "", Case(2, 8, stash), False) for stash in (0, 4, 8)]


def _equal(ranks: int, chunks: int = 1, forward: float = FORWARD) -> tuple[Costs]:
    return (_costs([forward / chunks] * (ranks * chunks)),)


def _costs(forward: Sequence[float]) -> Costs:
    return Costs(forward, [2 * seconds for seconds in forward])


def _in_ms(costs: Costs) -> str:
    return ", ".join(f"{1000 * seconds:.0f}" for seconds in costs.forward)


def tower_costs(
    name: str, ranks: int, microbatches: int
) -> tuple[tuple[Costs], tuple[Costs, Costs]]:
    """Seconds of a model's stages: both towers dealt together, and each dealt as suits it best.

    FLOPs in proportion, scaled so that the dearest fused stage takes FORWARD.
    """
    costs = load_architecture(name).costs
    vision, text = costs.vision, costs.text
    stages = partition(costs, ranks)
    fused = [vision.of(stage.vision) + text.of(stage.text) for stage in stages]
    scale = FORWARD / max(fused)

    def alone(tower: TowerCosts) -> Costs:
        deals = [_costs([scale * x for x in deal]) for deal in _even_deals(tower, ranks)]
        orders = step_orders(ranks, microbatches)
        return min(deals, key=lambda deal: simulate(orders, deal).total)

    return (_costs([scale * flops for flops in fused]),), (alone(vision), alone(text))


def _even_deals(costs: TowerCosts, ranks: int) -> Iterator[list[int]]:
    """FLOPs of each stage where stages differ by one layer, for every choice of the larger ones."""
    layers = costs.layers
    for larger in itertools.combinations(range(ranks), layers % ranks):
        counts = [layers // ranks + (rank in larger) for rank in range(ranks)]
        stops = list(itertools.accumulate(counts))
        firsts = [0, *stops]
        yield [costs.of(LayerRange(f, s, layers)) for f, s in zip(firsts, stops, strict=False)]


# ------------------------------------------------------------------------------- what it should be


def row_of(plan: Plan, steps: Sequence[Step]) -> Row:
    """The step of median overhead."""
    rows = [Row(plan, step, ideal_seconds(plan.case, step)) for step in steps]
    return sorted(rows, key=lambda row: row.overhead)[len(rows) // 2]


def ideal_seconds(case: Case, step: Step) -> float:
    """The least that a step can take whose ops took as long as they did: no message takes time, and
    none waits for its receiver."""
    taken = {(span.rank, span.op): span.end - span.start for span in step.spans}
    stages = [0.0] * (case.ranks * case.chunks)
    return simulate(orders_of(case), Costs(stages, stages), taken=taken).total


def formula_seconds(case: Case) -> float | None:
    """What the arithmetic says for the seconds that were asked for: the closed form where stages
    are equal and there is one, a simulation elsewhere; None for a real model."""
    if case.towers is None:
        return None
    forward, backward = case.towers[0].forward, case.towers[0].backward
    whole = case.chunks == 1 or case.stash in (0, case.microbatches)
    if len(case.towers) == 1 and len(set(forward)) == 1 and whole:
        return ideal_step_seconds(
            case.ranks,
            case.microbatches,
            case.chunks * forward[0],
            case.chunks * backward[0],
            case.stash,
            case.chunks,
        )
    return _asked(case).total


def orders_of(case: Case) -> list[list[PipelineOp]]:
    """The ops that each rank is to run."""
    orders = orders_in_turns if len(case.towers or []) == 2 else step_orders
    return orders(case.ranks, case.microbatches, case.stash, case.chunks)


def _asked(case: Case) -> Timeline:
    """The case by arithmetic, for the seconds that its stages are told to sleep."""
    costs = case.towers[0]
    if len(case.towers) == 2:
        costs = CostsInTurns(*case.towers, case.microbatches)
    return simulate(orders_of(case), costs)


def compare(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One pipeline against two in turns: as measured, and by the arithmetic for what was asked."""
    of_towers = [row for row in rows if row.plan.table == TOWERS]
    found = []
    for fused, separate in zip(of_towers[::2], of_towers[1::2], strict=True):
        case = fused.plan.case
        one, two = _asked(case), _asked(separate.plan.case)
        found.append(
            {
                "model": fused.plan.name.partition(",")[0],
                "ranks": case.ranks,
                "one_seconds": fused.step.total,
                "turns_seconds": separate.step.total,
                "measured": separate.step.total / fused.step.total,
                "by_arithmetic": two.total / one.total,
                "one_messages": one.messages,
                "turns_messages": two.messages,
            }
        )
    return found
