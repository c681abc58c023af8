"""The model of each phase of a run: that of the config, at the phase's size and patch dropout."""

from __future__ import annotations

from dataclasses import replace

from parallel_clip.config import Config, Phase
from parallel_clip.errors import InputError
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.known_models import known_name
from parallel_clip.model.resize_model import with_patch_dropout, with_sizes


def phase_models(config: Config, architecture: Architecture) -> tuple[Architecture, ...]:
    """`architecture`, the model of the config, as it is in each phase; itself where there are none.

    Raises:
        InputError: a resolution has no whole number of patches, or the model is built without patch
            dropout.
    """
    if not config.phases:
        return (architecture,)
    loss = config.loss.kind
    return tuple(
        _of_phase(architecture, phase, f"phases.{number}", loss)
        for number, phase in enumerate(config.phases)
    )


def _of_phase(architecture: Architecture, phase: Phase, key: str, loss: str) -> Architecture:
    model = architecture
    if phase.resolution is not None:
        try:
            model = with_sizes(architecture, phase.resolution)
        except InputError as error:
            raise InputError(f"{key}.resolution {phase.resolution}: {error}") from None
        _check_whole_patches(architecture, model, f"{key}.resolution {phase.resolution}")
        model = replace(model, name=known_name(model, loss) or model.name)
    if phase.patch_dropout is not None:
        try:
            model = with_patch_dropout(model, phase.patch_dropout)
        except InputError as error:
            raise InputError(f"{key}.patch_dropout {phase.patch_dropout:g}: {error}") from None
    return model


def _check_whole_patches(whole: Architecture, model: Architecture, said: str) -> None:
    """The model's own size may have a rest, which the convolution over patches leaves out."""
    sides, patch = model.vision.image_size, model.vision.patch_size
    if sides == whole.vision.image_size or not any(
        s % p for s, p in zip(sides, patch, strict=True)
    ):
        return
    near = [
        " x ".join(str(side // p * p + up * p) for side, p in zip(sides, patch, strict=True))
        for up in (0, 1)
    ]
    raise InputError(
        f"{said} is no whole number of patches of {patch[0]} x {patch[1]} pixels: a part of each "
        f"picture would not be seen; the nearest are {' and '.join(near)}"
    )
