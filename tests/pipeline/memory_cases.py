"""What ranks do in test_memory.py: run a step, and count what autograd keeps meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from parallel_clip.engine.groups import Groups
from parallel_clip.loss import ClipLoss
from parallel_clip.model.clip import CLIPModel
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.pipeline.forward_backward import TwoPassStep, forward_backward
from parallel_clip.plan.layout_plan import make_layout_plan
from parallel_clip.plan.memory import measure_rank_memory
from parallel_clip.plan.saved_activations import storage_id
from tests.pipeline.forward_backward_cases import Way
from tests.ranks import Weights, config_of, loaded_training, own_microbatches


class Peaks(NamedTuple):
    """Of one step on one rank; a graph is that of one microbatch in one of the rank's stages.

    `other_bytes`: the most that is kept besides graphs, on the last stage for what begins backward.
    """

    graphs: int
    graph_bytes: int
    other_bytes: int
    graphs_left: int
    bytes_left: int


class LivingTensors:
    """Counts the tensors that autograd keeps and has not let go yet, each memory once however many
    hold it. Those in `excluded`, such as parameters and inputs, do not count."""

    def __init__(self, excluded: Iterable[Tensor]):
        self._excluded = {storage_id(tensor) for tensor in excluded}
        self._running: tuple[CLIPModel, int] | None = None
        self._holders: Counter[tuple[Any, int]] = Counter()  # by (graph or None, memory)
        self._sizes: dict[tuple[Any, int], int] = {}
        self.most_graphs = self.most_graph_bytes = self.most_other_bytes = 0

    @contextmanager
    def counting(self):
        through = TwoPassStep.run_forward

        def noted(step, chunk, number, *others):
            self._running = chunk.module, number
            try:
                return through(step, chunk, number, *others)
            finally:
                self._running = None

        with (
            mock.patch.object(TwoPassStep, "run_forward", noted),
            saved_tensors_hooks(self._keep, _give),
        ):
            yield

    def graphs(self) -> int:
        return len({graph for graph, _ in self._sizes if graph is not None})

    def bytes(self, of_graphs: bool) -> int:
        """Of all graphs together, or of what is in none of them and besides them."""
        in_graphs = {memory: n for (graph, memory), n in self._sizes.items() if graph is not None}
        if of_graphs:
            return sum(in_graphs.values())
        return sum(n for (_, memory), n in self._sizes.items() if memory not in in_graphs)

    def _keep(self, tensor: Tensor) -> _Kept:
        memory = storage_id(tensor)
        if memory in self._excluded:
            return _Kept(tensor, None)
        place = self._running, memory
        self._holders[place] += 1
        self._sizes[place] = tensor.untyped_storage().nbytes()
        self.most_graphs = max(self.most_graphs, self.graphs())
        self.most_graph_bytes = max(self.most_graph_bytes, self.bytes(of_graphs=True))
        self.most_other_bytes = max(self.most_other_bytes, self.bytes(of_graphs=False))
        return _Kept(tensor, lambda: self._let_go(place))

    def _let_go(self, place: tuple[Any, int]) -> None:
        self._holders[place] -= 1
        if not self._holders[place]:
            del self._holders[place], self._sizes[place]


class _Kept:
    """A tensor in autograd's hands; says when it has been let go."""

    def __init__(self, tensor: Tensor, let_go):
        self.tensor, self.let_go = tensor, let_go

    def __del__(self):
        if self.let_go is not None:
            self.let_go()


def _give(kept: _Kept) -> Tensor:
    return kept.tensor


def peaks(
    groups: Groups,
    model_cfg: dict[str, Any],
    weights: Weights,
    images: Tensor,
    tokens: Tensor,
    ways: list[Way],
    settings: dict[str, Any],
) -> tuple[dict[Way, list[Peaks]], dict[Way, list[int]]]:
    """What two steps in a row hold, each way, and what `measure_rank_memory` says of a graph of
    each of this rank's stages."""
    architecture = architecture_from_json(model_cfg, "small")
    measured, counted = {}, {}
    pairs = len(tokens) // groups.layout.data
    for way in ways:
        batch = {"global": len(tokens), "micro": pairs // way.microbatches}
        config = config_of(groups.layout, batch=batch, **settings)
        plan = make_layout_plan(architecture.costs, groups.layout.world, config)
        counted[way] = measure_rank_memory(config, architecture, plan, groups).saved_by_chunk
        built = loaded_training(groups, config, architecture, weights)
        microbatches = own_microbatches(groups, images, tokens, way.microbatches)
        parameters = [p for chunk in built.chunks for p in chunk.parameters()]
        living = [*parameters, images, tokens]
        measured[way] = [_step(groups, built, microbatches, way, living) for _ in range(2)]
    return measured, counted


def _step(groups: Groups, built, microbatches, way: Way, excluded: list[Tensor]) -> Peaks:
    built.optimizer.zero_grad()
    living = LivingTensors(excluded)
    with living.counting():
        forward_backward(built.wrapped, microbatches, _uncounted(groups), way.stash)
    return Peaks(
        living.most_graphs,
        living.most_graph_bytes,
        living.most_other_bytes,
        living.graphs(),
        living.bytes(of_graphs=True) + living.bytes(of_graphs=False),
    )


def _uncounted(groups: Groups):
    """The loss, whose own graph sees the whole batch and is gone before the second pass."""
    loss = ClipLoss(group=groups.data)

    def uncounted(*features: Tensor, **options: Any) -> Tensor:
        with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            return loss(*features, **options)

    return uncounted
