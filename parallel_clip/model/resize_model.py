"""The same model for pictures of another size, texts of another length, or another share of patches
that training leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

from parallel_clip.model.architecture import Architecture
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.model.timm_trunks import trunk_for_size


def with_sizes(
    architecture: Architecture,
    image_size: int | Sequence[int] | None = None,
    context_length: int | None = None,
) -> Architecture:
    """As OpenCLIP's `--force-image-size` and `--force-context-length` have it.

    image_size: of both sides or [height, width], in pixels; None: as it is. Where timm has the same
    trunk under another name for this size, the JSON names that one: OpenCLIP builds a trunk at the
    size of its name.

    Raises:
        InputError: a picture would have no whole patch.
    """
    if image_size is None and context_length is None:
        return architecture
    config = deepcopy(architecture.json)
    vision, text = config["vision_cfg"], config["text_cfg"]
    if image_size is not None:
        sides = {image_size} if isinstance(image_size, int) else {*image_size}
        vision["image_size"] = next(iter(sides)) if len(sides) == 1 else list(image_size)
        if vision.get("timm_model_name"):
            vision["timm_model_name"] = trunk_for_size(
                vision["timm_model_name"], vision["image_size"]
            )
    if context_length is not None:
        text["context_length"] = context_length
    return architecture_from_json(config, architecture.name)


def with_patch_dropout(architecture: Architecture, share: float) -> Architecture:
    """The model with OpenCLIP's `--force-patch-dropout`: training leaves out `share` of a picture's
    patches, 0 to 1.

    Raises:
        InputError: the image tower is one that is built without.
    """
    config = deepcopy(architecture.json)
    config["vision_cfg"]["patch_dropout"] = share
    return architecture_from_json(config, architecture.name)
