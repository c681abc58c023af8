"""One optimizer step's forward and backward over its microbatches and pipeline stages.

A contrastive batch cannot be split into microbatches by averaging: the loss needs every embedding.
So a step makes two passes, both through megatron-core's own schedule:

1. All microbatches forward; the last stage collects their features. The last `stash` of them keep
   their graphs, the others run without one. Then the loss over the whole global batch, and its
   gradient with respect to each feature, on the last stage.
2. All microbatches forward and backward (1F1B), with that gradient. For those that kept their
   graphs, forward is there already: only their backward runs.

`stash` none is known as gradient caching (Gao et al., "Scaling Deep Contrastive Learning Batch Size
under Memory Limited Setup", arXiv 2101.06983): one more forward, and the memory of 1F1B. `stash`
all is a plain step: no extra forward, and the memory of all microbatches. In between, each
microbatch that keeps its graph saves a forward and costs its activations. The gradient is the same.
A tower that is frozen whole runs in pass 1 alone.

m microbatches, b pictures in each with k texts each, D the embedding width; features are
[b + b·k, D], pictures first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, Protocol

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.distributed import ProcessGroup

from parallel_clip.engine.collectives import broadcast_from_last_stage
from parallel_clip.model.clip import Again, CLIPModel
from parallel_clip.pipeline.communicator import gradient_messages
from parallel_clip.pipeline.inputs import StepInputs
from parallel_clip.pipeline.logit_parameters import shared_logit_parameters
from parallel_clip.pipeline.measured_bias import measured_bias


class LossFunction(Protocol):
    """The losses of loss/, of which this room knows no more. images, texts: [n, D] and [n·k, D];
    identities: int64 [n·k], equal where texts are duplicates, or None."""

    def __call__(
        self,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        /,
        *,
        identities: Tensor | None,
    ) -> Tensor: ...


class LossReport(NamedTuple):
    """The loss of the global batch, and how many numbers of this rank's picture and text features
    are not finite; 0-dim on the device."""

    value: Tensor
    bad_images: Tensor
    bad_texts: Tensor


def forward_backward(
    chunks: Sequence[DistributedDataParallel],
    inputs: StepInputs,
    loss: LossFunction,
    stash: int,
    loss_pipeline_group: ProcessGroup | None = None,
    set_bias: Callable[[Tensor], None] | None = None,
) -> LossReport:
    """Accumulate the gradient of the global batch's loss in the model.

    chunks: this rank's stages, in order: one, or as many as there are virtual stages a rank;
    stash: how many microbatches keep their graphs; loss_pipeline_group: the pipeline group where
    `loss` is computed on all stages, None where it is on the last alone; set_bias: sets the model's
    bias, on the last stage, to what is measured on this batch before its loss is computed
    (measured_bias.py). Gradients are summed over microbatches in fp32 and averaged over
    data-parallel ranks, as `loss` expects of its caller.
    The report is that of the loss on the last stage, and zero on the others.
    """
    step = TwoPassStep(chunks, inputs, loss, stash, loss_pipeline_group, set_bias)
    step.first_pass()
    step.compute_loss()
    step.second_pass()
    return step.report


class _Graph(NamedTuple):
    """The graph of a forward pass of pass 1: the edge at its result, None where nothing in it is
    trained, and the message that it took. The result itself is freed once it has been sent."""

    result: GradientEdge | None
    received: Tensor | None


@dataclass(eq=False)
class TwoPassStep:
    """The state of one `forward_backward`; what belongs to the last stage is empty on the others.

    features: [b + b·k, D] of each microbatch, from pass 1; feature_grads: the loss's gradient with
    respect to each, [b, D] and [b·k, D]; logit_grads: that of each of `logit_parameters`.
    """

    chunks: Sequence[DistributedDataParallel]
    inputs: StepInputs
    loss: LossFunction
    stash: int
    loss_pipeline_group: ProcessGroup | None = None
    set_bias: Callable[[Tensor], None] | None = None

    def __post_init__(self):
        self.last: CLIPModel = self.chunks[-1].module
        self.microbatches = len(self.inputs.tokens)
        self.pairs = len(self.inputs.tokens[0]) // self.last.captions
        self.first_stashed = self.microbatches - self.stash
        self.graphs: dict[tuple[CLIPModel, int], _Graph] = {}
        self.features: list[Tensor] = []
        self.feature_grads: Sequence[tuple[Tensor, Tensor]] = []
        logit_parameters = self.last.logit_scale, self.last.logit_bias
        self.logit_parameters = [p for p in logit_parameters if p is not None]
        self.logit_grads: list[Tensor] = []
        self.report = LossReport(*torch.zeros(3, device=self.inputs.tokens[0].device))

    # ------------------------------------------------------------------------------ two passes

    def first_pass(self) -> None:
        """Fill `features` (on the last stage) and `graphs`."""
        self.features = self._run(self._forward, forward_only=True)

    def compute_loss(self) -> None:
        """Compute the loss over all microbatches and its gradients, on the last stage; the others
        take part where there is a `loss_pipeline_group`."""
        last = self.last
        if not last.stage.is_last and self.loss_pipeline_group is None:
            return
        images, texts = self._all_features().tensor_split([self.microbatches * self.pairs])
        identities = self.inputs.identities
        if self.set_bias is not None:
            self._measure_bias(images, texts, self.set_bias)
        images.requires_grad_()
        texts.requires_grad_()
        if self.loss_pipeline_group is not None:
            logit_scale_and_bias = shared_logit_parameters([last], self.loss_pipeline_group)
        if not last.stage.is_last:  # the loss adds this rank's part on the last stage
            self.loss(images, texts, *logit_scale_and_bias, identities=identities)
            return
        value = self.loss(
            images, texts, last.logit_scale.exp(), last.logit_bias, identities=identities
        )
        image_grads, text_grads, *self.logit_grads = torch.autograd.grad(
            value, [images, texts, *self.logit_parameters], materialize_grads=True
        )
        parts = (grads.chunk(self.microbatches) for grads in (image_grads, text_grads))
        self.feature_grads = list(zip(*parts, strict=True))
        bad = (features.detach().isfinite().logical_not().sum() for features in (images, texts))
        self.report = LossReport(value.detach(), *(count.float() for count in bad))

    def _measure_bias(
        self, images: Tensor, texts: Tensor, set_bias: Callable[[Tensor], None]
    ) -> None:
        if self.loss_pipeline_group is not None:
            scale, _ = shared_logit_parameters([self.last], self.loss_pipeline_group)
        else:
            scale = self.last.logit_scale.detach().exp()
        identities = self.inputs.identities
        bias = measured_bias(
            lambda bias: self.loss(images, texts, scale, bias, identities=identities), scale
        )
        if self.last.stage.is_last:
            set_bias(bias)

    def _all_features(self) -> Tensor:
        """[m·b + m·b·k, D], pictures first, on the stages that work on the loss."""
        tokens = self.inputs.tokens[0]
        if self.last.stage.is_last:
            both = zip(*(part.tensor_split([self.pairs]) for part in self.features), strict=True)
            features = torch.cat([*chain.from_iterable(both)])
        else:
            rows = (self.pairs + len(tokens)) * self.microbatches
            features = torch.empty(rows, self.last.architecture.embed_dim, device=tokens.device)
        if self.loss_pipeline_group is not None:
            broadcast_from_last_stage(features, self.loss_pipeline_group)
        return features

    def second_pass(self) -> None:
        self._run(self._forward_for_backward, forward_only=False)

    def _run(self, forward_step: Callable, forward_only: bool) -> list:
        count, model = self.microbatches, self.chunks[0].module
        length = model.messages.length(self.pairs, model.training)
        return get_forward_backward_func()(
            **gradient_messages(self.chunks),
            forward_step_func=forward_step,
            data_iterator=[iter(range(count)) for _ in self.chunks],
            model=list(self.chunks),
            num_microbatches=count,
            # The schedule divides by the tensor size for sequence parallelism. A message has this
            # rank's tokens already.
            seq_length=length * model.messages.sequence_ranks,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    # ------------------------------------------------ what the schedule calls for a microbatch

    def _forward(self, numbers: Iterator[int], chunk: DistributedDataParallel):
        """Pass 1: the result without its graph, which goes to `graphs` where it is kept."""
        number = next(numbers)
        keep = number >= self.first_stashed
        with torch.set_grad_enabled(keep):  # forward_only alone does not switch autograd off
            received = chunk.module.input_tensor
            result = self.run_forward(chunk, number, self.microbatches)
        if keep:
            edge = get_gradient_edge(result) if result.requires_grad else None
            self.graphs[chunk.module, number] = _Graph(edge, received)
        return result.detach(), lambda features, **_: features

    def _forward_for_backward(self, numbers: Iterator[int], chunk: DistributedDataParallel):
        """Pass 2: the result with its graph, and how the last stage begins backward."""
        number = next(numbers)
        graph = self.graphs.pop((chunk.module, number), None)
        if graph is None:
            last = chunk.module.stage.is_last
            again = Again(self.features[number] if last else None)
            result = self.run_forward(chunk, number, self.first_stashed, again)
        else:
            result = self._replay(chunk.module, number, graph)
        return result, lambda features: (self.surrogate_loss(features, number), {})

    def run_forward(
        self,
        chunk: DistributedDataParallel,
        number: int,
        stop: int,
        again: Again | None = None,
    ) -> Tensor:
        """A microbatch through a stage, in a pass that runs microbatches 0 to `stop` - 1 forward.
        A stage's microbatches come in ascending order, whatever the schedule."""
        images = kept = None
        if chunk.module.stage.is_first and not (again and chunk.module.frozen.vision.whole):
            following = number + 1 if number + 1 < stop else None
            images, kept = self.inputs.pictures(number, following)
        return chunk(images, self.inputs.tokens[number], kept, again)

    def _replay(self, model: CLIPModel, number: int, graph: _Graph) -> Tensor:
        """A result whose backward is that of pass 1's forward. On the last stage its values are the
        features; a message's do not matter, as the next stage replays too."""
        if model.stage.is_last:
            values = self.features[number].clone()
        else:
            length = model.messages.length(self.pairs, model.training)
            device = self.inputs.tokens[number].device
            values = torch.empty(length, 1, 1, dtype=model.config.pipeline_dtype, device=device)
        received = model.pop_input_tensor()
        if graph.result is None:
            return values
        if received is None:  # autograd records nothing where no input wants a gradient
            received = torch.empty(0, requires_grad=True)
        return _Replay.apply(received, graph, lambda: values)

    def surrogate_loss(self, features: Tensor, number: int) -> Tensor:
        """0-dim, its gradient that of the loss. The schedule divides it by m, so the features'
        part is multiplied by m; the logit parameters' gradient is whole already, and each
        microbatch adds its share, so that they take part in the data-parallel sum like others."""
        grads = torch.cat(self.feature_grads[number])
        dot = self.microbatches * (features * grads).sum()
        for parameter, grad in zip(self.logit_parameters, self.logit_grads, strict=True):
            dot = dot + parameter * grad
        return dot


class _Replay(torch.autograd.Function):
    """Forward returns `values`; backward runs through a graph that pass 1 kept."""

    @staticmethod
    def forward(ctx, received: Tensor, graph: _Graph, values: Callable[[], Tensor]) -> Tensor:
        ctx.graph = graph
        return values()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, None, None]:
        graph, ctx.graph = ctx.graph, None
        torch.autograd.backward(graph.result, grad)
        return (None if graph.received is None else graph.received.grad), None, None
