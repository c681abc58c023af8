"""One optimizer step's forward and backward over its microbatches.

A contrastive batch cannot be split into microbatches by averaging: the loss needs every embedding.
Two exact ways, chosen by `parallel.schedule`:

- two-pass: all microbatches forward without a graph, the loss over the whole global batch and its
  gradient with respect to each embedding, then all microbatches forward and backward with that
  gradient. One more forward; the memory of one microbatch. (Gao et al., "Scaling Deep Contrastive
  Learning Batch Size under Memory Limited Setup", arXiv 2101.06983.)
- stash: all microbatches forward keeping their graphs, the loss, then all backward. No extra
  forward; the memory of all microbatches. With one microbatch this is a plain step.

m microbatches, b pairs in each, D the embedding width; `features` are [2, b, D], pictures first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from parallel_clip.errors import InputError
from parallel_clip.model.clip import CLIPModel

# (image features [n, D], text features [n, D], multiplier, bias or None) -> loss, as in loss/
ContrastiveLoss = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Inputs:
    """A microbatch on the device: images fp32 [b, 3, height, width], tokens int64 [b, context],
    kept patches int64 [b, k] (None: all)."""

    images: Tensor
    tokens: Tensor
    kept: Tensor | None = None


def choose_schedule(requested: str, microbatches: int) -> str:
    """What `parallel.schedule` comes to: `stash` or `two-pass`."""
    if requested == "auto":
        return "stash" if microbatches == 1 else "two-pass"
    if requested not in ("stash", "two-pass"):
        raise InputError(f"parallel.schedule {requested!r}: expected auto, two-pass or stash")
    return requested


def forward_backward(
    ddp: DistributedDataParallel,
    microbatches: Sequence[Inputs],
    loss: ContrastiveLoss,
    schedule: str,
) -> Tensor:
    """Accumulate the gradient of the global batch's loss in the model; return that loss (0-dim).

    Gradients are summed over microbatches in fp32 and averaged over data-parallel ranks, as `loss`
    expects of its caller.
    """
    run = _stash if schedule == "stash" else _two_pass
    return run(ddp, microbatches, loss)


def _two_pass(
    ddp: DistributedDataParallel, microbatches: Sequence[Inputs], loss: ContrastiveLoss
) -> Tensor:
    model: CLIPModel = ddp.module
    count = len(microbatches)
    run_microbatches = get_forward_backward_func()

    def forward(inputs, model):
        batch = next(inputs)
        return model(batch.images, batch.tokens, batch.kept), lambda features, **_: features

    with torch.no_grad():  # forward_only alone does not switch autograd off
        features = run_microbatches(
            forward_step_func=forward,
            data_iterator=iter(microbatches),
            model=ddp,
            num_microbatches=count,
            seq_length=1,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    value, feature_grads, logit_grads = _loss_gradients(model, features, loss)
    logit_parameters = _logit_parameters(model)

    def forward_with_gradient(inputs, model):
        batch, feature_grad = next(inputs)

        def surrogate(features: Tensor):
            # The schedule divides by the count, so the features' part is multiplied by it; the
            # logit parameters' gradient is whole already and each microbatch adds its share.
            dot = count * (features * feature_grad).sum()
            for parameter, grad in zip(logit_parameters, logit_grads, strict=True):
                dot = dot + parameter * grad
            return dot, {}

        return model(batch.images, batch.tokens, batch.kept), surrogate

    run_microbatches(
        forward_step_func=forward_with_gradient,
        data_iterator=zip(microbatches, feature_grads, strict=True),
        model=ddp,
        num_microbatches=count,
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
    )
    return value


def _stash(
    ddp: DistributedDataParallel, microbatches: Sequence[Inputs], loss: ContrastiveLoss
) -> Tensor:
    # megatron-core's schedules free a microbatch's graph before the next begins, so this loop is
    # our own.
    model: CLIPModel = ddp.module
    features = [ddp(batch.images, batch.tokens, batch.kept) for batch in microbatches]
    value, feature_grads, logit_grads = _loss_gradients(model, features, loss)
    roots = list(zip(features, feature_grads, strict=True))
    with ddp.no_sync():  # gradients travel once, with the last microbatch
        for root, grad in roots[:-1]:
            root.backward(grad)
    torch.autograd.backward([roots[-1][0], *_logit_parameters(model)], [roots[-1][1], *logit_grads])
    finalize_model_grads([ddp])
    return value


def _loss_gradients(
    model: CLIPModel, features: Sequence[Tensor], loss: ContrastiveLoss
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The loss over all microbatches, and its gradients: of each microbatch's features, and of
    the logit parameters."""
    leaves = torch.cat([f.detach() for f in features], dim=1).requires_grad_()
    value = loss(leaves[0], leaves[1], model.logit_scale.exp(), model.logit_bias)
    parameters = _logit_parameters(model)
    leaf_grad, *logit_grads = torch.autograd.grad(
        value, [leaves, *parameters], materialize_grads=True
    )
    return value.detach(), list(leaf_grad.split([f.shape[1] for f in features], dim=1)), logit_grads


def _logit_parameters(model: CLIPModel) -> list[Tensor]:
    return [p for p in (model.logit_scale, model.logit_bias) if p is not None]
