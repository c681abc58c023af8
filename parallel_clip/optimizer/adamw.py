"""AdamW on fp32 masters, by megatron-core: split over the data ranks (ZeRO-1) or whole on each.

Fused Adam from Transformer Engine or Apex is used by megatron-core where one is installed, torch's
AdamW otherwise. Masters and moments are read and written by parameter, so that a checkpoint does
not depend on how they are split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from torch import Tensor, nn

from parallel_clip.config import Optimizer as OptimizerSettings
from parallel_clip.model.clip import global_parameters
from parallel_clip.optimizer import MOMENTS
from parallel_clip.optimizer.update_rules import UpdateRule, update_rules


@dataclass(frozen=True)
class OwnedState:
    """The part of a tensor that this data rank updates: elements [start, stop), flattened.

    master: fp32 [stop - start]; moments: likewise, or None before the first step.
    """

    start: int
    stop: int
    master: Tensor
    moments: dict[str, Tensor] | None


class MegatronAdamW:
    """AdamW over those of a rank's tensors that are trained, each by its rule in update_rules.py.

    wrapped: the rank's model chunks under DDP, whose config says in which precision they run;
    trained_since: after how many updates some parameters began to be trained, by name.
    """

    def __init__(
        self,
        wrapped: Sequence[DistributedDataParallel],
        settings: OptimizerSettings,
        trained_since: Mapping[str, int] | None = None,
    ):
        self.wrapped = list(wrapped)
        first = self.wrapped[0]
        dtype = first.module.config.params_dtype
        self._device = next(first.module.parameters()).device
        self.weight_decay = settings.weight_decay
        rules = update_rules(first.module.architecture, settings)
        parameters = global_parameters([ddp.module for ddp in self.wrapped])
        by_tensor = {id(tensor): rules[parameter.name] for parameter, tensor in parameters}
        since = {id(t): (trained_since or {}).get(parameter.name, 0) for parameter, t in parameters}
        chain = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=settings.lr,
                weight_decay=settings.weight_decay,
                adam_beta1=settings.betas[0],
                adam_beta2=settings.betas[1],
                adam_eps=settings.eps,
                bf16=dtype == torch.bfloat16,
                params_dtype=dtype,
                use_distributed_optimizer=first.ddp_config.use_distributed_optimizer,
                # Infinity clips nothing.
                clip_grad=settings.clip_grad_norm or float("inf"),
            ),
            self.wrapped,
            config_overrides=_overrides(by_tensor, since),
            use_gloo_process_groups=False,
        )
        (self._megatron,) = chain.chained_optimizers  # one, as there are no experts
        self._adam: torch.optim.Optimizer | None = self._megatron.optimizer
        if isinstance(self._adam, torch.optim.AdamW):
            for group in self._adam.param_groups:
                group["fused"] = True  # one pass over memory, not ten
        # Whether masters and moments are split over the data ranks (ZeRO-1).
        self.splits_state = isinstance(self._megatron, DistributedOptimizer)
        if self.splits_state:
            self._owned_masters = _masters_by_tensor(self._megatron)

    def zero_grad(self) -> None:
        """Clear the gradients that DDP accumulates."""
        for ddp in self.wrapped:
            ddp.zero_grad_buffer()
        self._megatron.zero_grad()

    @torch.no_grad()
    def squared_gradient_norm(self) -> tuple[Tensor, Tensor]:
        """The square of the gradients' L2 norm over all ranks, fp32 0-dim, and whether all of this
        rank's gradients are finite, bool 0-dim; both on the device, for which the host need not
        wait.

        The norm takes each parameter from one rank alone: a copy that was spoilt, by a flipped bit
        or in a collective, would not show in it.
        """
        buffers = [buffer.grad_data for ddp in self.wrapped for buffer in ddp.buffers]
        sums = [buffer.sum() for buffer in buffers]  # none where all of this rank's is frozen
        all_finite = torch.stack(sums or [torch.zeros((), device=self._device)]).isfinite().all()
        self._megatron.prepare_grads()
        # As megatron-core's `get_grad_norm_fp32`, which reads one number a tensor where neither
        # Transformer Engine nor Apex is.
        if hasattr(self._megatron, "get_main_grads_for_grad_norm"):  # megatron-core 0.16
            grads = self._megatron.get_main_grads_for_grad_norm()
        else:
            grads = self._megatron.get_grads_for_grad_norm()
        squared = torch.zeros((), device=all_finite.device)
        if grads:
            squared = torch.stack(torch._foreach_norm(grads)).norm() ** 2
        dist.all_reduce(squared, group=self._megatron.get_grad_stats_parallel_group())
        return squared, all_finite

    @torch.no_grad()
    def clip_gradients(self, norm: float) -> None:
        """Scale the gradients to `optimizer.clip_grad_norm`, where `norm`, theirs, is above it."""
        coefficient = self._megatron.config.clip_grad / (norm + 1e-6)
        if coefficient < 1:
            grads = [p.grad for p in self._megatron.get_parameters() if p.grad is not None]
            torch._foreach_mul_(grads, coefficient)

    def update(self, lr: float) -> None:
        """Update the weights with the gradients that were clipped; `lr`: of the step."""
        # megatron-core makes no Adam where all of a rank is frozen.
        for group in self._adam.param_groups if self._adam is not None else ():
            group["lr"] = lr * group["lr_mult"]
            group["weight_decay"] = self.weight_decay * group["wd_mult"]
        self._megatron.step_with_ready_grads()

    # ------------------------------------------------------------- masters and moments by tensor

    def owned_state(self, tensor: nn.Parameter) -> OwnedState | None:
        """This data rank's part of `tensor`; None where it owns nothing of it, or it is frozen."""
        master = self._master(tensor)
        if master is None:
            return None
        start, stop = 0, tensor.numel()
        if self.splits_state:
            owned = self._megatron._get_model_param_range_map(tensor)["param"]
            start, stop = owned.start, owned.end
        state = self._adam.state.get(master, {})
        moments = {name: state[name].view(-1) for name in MOMENTS} if state else None
        return OwnedState(start, stop, master.detach().view(-1), moments)

    @torch.no_grad()
    def set_weight(self, tensor: nn.Parameter, value: Tensor) -> None:
        """Set a tensor and its fp32 master. `value`: fp32, of the tensor's shape."""
        tensor.copy_(value)
        owned = self.owned_state(tensor)
        if owned is not None:
            owned.master.copy_(value.reshape(-1)[owned.start : owned.stop])

    @torch.no_grad()
    def copy_masters_to_weights(self) -> None:
        """Set the model's tensors from the masters, as an update does. Called by all data ranks."""
        for tensor in chain.from_iterable(ddp.module.parameters() for ddp in self.wrapped):
            owned = self.owned_state(tensor)
            if owned is not None:
                tensor.view(-1)[owned.start : owned.stop].copy_(owned.master)
        if self.splits_state:
            for ddp in self.wrapped:
                ddp.start_param_sync()

    @torch.no_grad()
    def set_moments(self, tensor: nn.Parameter, moments: dict[str, Tensor], step: int) -> None:
        """Set Adam's moments (fp32, of the tensor's shape) as they were after `step` steps."""
        owned = self.owned_state(tensor)
        if owned is None:
            return
        master = self._master(tensor)
        state = self._adam.state[master]
        for name in MOMENTS:
            part = moments[name].reshape(-1)[owned.start : owned.stop]
            state[name] = part.to(master.device, copy=True).view_as(master)
        if isinstance(self._adam, torch.optim.AdamW):
            state["step"] = torch.tensor(float(step), device=master.device)
        else:  # the fused ones count for all parameters of a group together
            for group in self._adam.param_groups:
                if any(parameter is master for parameter in group["params"]):
                    group["step"] = step

    def _master(self, tensor: nn.Parameter) -> nn.Parameter | None:
        if not tensor.requires_grad:
            return None
        if self.splits_state:
            return self._owned_masters.get(tensor)
        return getattr(tensor, "main_param", tensor)


def _overrides(
    rules: Mapping[int, UpdateRule], since: Mapping[int, int]
) -> dict[ParamKey, dict[str, float]]:
    """What megatron-core makes parameter groups by: those of the same overrides are one group, and
    every rank has a group, if an empty one, for what any rank has.

    rules and since (which update a tensor was first trained after): by the id of a tensor. The
    fused optimizers count updates by group.
    """

    def where(name: str, holds: Callable[[int], bool]) -> ParamKey:
        predicate = ParamWithNamePredicate(name, lambda tensor, _: holds(id(tensor)))
        return ParamKey(with_name_predicate=predicate)

    # What is as megatron-core has it by itself is left out: groups keep their order.
    scales = {rule.lr_scale for rule in rules.values()} - {1.0}
    overrides = {where("undecayed", lambda key: not rules[key].decayed): {"wd_mult": 0.0}}
    for scale in sorted(scales):
        of_scale = where(f"lr_scale {scale!r}", lambda key, s=scale: rules[key].lr_scale == s)
        overrides[of_scale] = {"lr_mult": scale}
    for updates in sorted(set(since.values()) - {0}):
        began = where(f"trained since {updates}", lambda key, u=updates: since[key] == u)
        overrides[began] = {"trained_since": updates}
    return overrides


def _masters_by_tensor(split: DistributedOptimizer) -> dict[nn.Parameter, nn.Parameter]:
    """The masters that this data rank owns, each a part of a model tensor, by that tensor.

    Its own `model_param_group_index_map` is not right where a group has fp32 tensors behind bf16
    ones, as with the logit scale of a second virtual stage: the optimizer puts fp32 ones first.
    """
    tensors = chain(*split.model_float16_groups, *split.model_fp32_groups)
    masters = chain(*split.shard_fp32_from_float16_groups, *split.shard_fp32_groups)
    return dict(zip(tensors, masters, strict=True))
