"""What ranks do in test_forward_backward.py."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple
from unittest import mock

from megatron.core.pipeline_parallel import p2p_communication
from torch import Tensor

from parallel_clip.engine.collectives import broadcast_from_last_stage
from parallel_clip.engine.groups import Groups
from parallel_clip.loss import ClipLoss, SigLipLoss
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.pipeline.forward_backward import forward_backward
from tests.ranks import Weights, config_of, loaded_training, own_microbatches

LOSSES = {"infonce": ClipLoss, "sigmoid": SigLipLoss}


class Way(NamedTuple):
    """How a step runs: in how many microbatches, how many of them keep their graphs, whether all
    stages work on the loss, and whether the bias is measured first."""

    microbatches: int
    stash: int
    loss_on_all_stages: bool = False
    measures_bias: bool = False


def steps(
    groups: Groups,
    model_cfg: dict[str, Any],
    weights: Weights,
    images: Tensor,
    tokens: Tensor,
    kept: Tensor | None,
    loss: str,
    ways: list[Way],
    settings: dict[str, Any],
) -> dict[Way, tuple[float, dict[str, Tensor]]]:
    """The loss and this rank's reduced gradients by name, for the same weights in several ways.
    What is frozen has none."""
    settings["parallel"] = {**settings.get("parallel", {}), "distributed_optimizer": False}
    config = config_of(groups.layout, **settings)
    architecture = architecture_from_json(model_cfg, "small")
    built = loaded_training(groups, config, architecture, weights)
    outcomes = {}
    for way in ways:
        built.optimizer.zero_grad()
        helpers = groups.model if way.loss_on_all_stages else groups.tensor
        report = forward_backward(
            built.wrapped,
            own_microbatches(groups, images, tokens, way.microbatches, kept),
            LOSSES[loss](
                group=groups.data,
                helpers=helpers,
                tile=3,
                captions_per_image=config.data.captions_per_image,
            ),
            way.stash,
            groups.pipeline if way.loss_on_all_stages else None,
            partial(built.set_weight, built.chunks[-1].logit_bias) if way.measures_bias else None,
        )
        gradients = {
            p.name: tensor.main_grad.clone()
            for p, tensor in built.global_parameters()
            if tensor.requires_grad
        }
        outcomes[way] = broadcast_from_last_stage(report.value, groups.pipeline).item(), gradients
    return outcomes


def gradients_sent(
    groups: Groups,
    model_cfg: dict[str, Any],
    weights: Weights,
    images: Tensor,
    tokens: Tensor,
    microbatches: int,
    settings: dict[str, Any],
) -> int:
    """How many messages this rank sends back to the stage in front of it in a step."""
    config = config_of(groups.layout, **settings)
    architecture = architecture_from_json(model_cfg, "small")
    built = loaded_training(groups, config, architecture, weights)
    through, sent = p2p_communication._batched_p2p_ops, []

    def noted(**arguments):
        sent.append(arguments["tensor_send_prev"])
        return through(**arguments)

    with mock.patch.object(p2p_communication, "_batched_p2p_ops", noted):
        inputs = own_microbatches(groups, images, tokens, microbatches)
        loss = SigLipLoss(group=groups.data)
        forward_backward(built.wrapped, inputs, loss, stash=0)
    return sum(tensor is not None for tensor in sent)
