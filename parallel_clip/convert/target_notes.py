"""What a target format cannot say of a model, or says otherwise, in words for the user."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from parallel_clip.convert.huggingface_config_writer import is_siglip
from parallel_clip.convert.model_card import CARD
from parallel_clip.convert.zero_shot_pipeline import PIPELINE_TOKENS, text_length_line
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.timm_json import TRUNK_KEYS
from parallel_clip.model.timm_trunks import trunk_size


def target_notes(architecture: Architecture, source: Path, to: str) -> Iterator[str]:
    """Notes on a conversion of a model from the folder `source`; to: openclip, huggingface or
    run."""
    if to == "openclip":
        yield from _openclip_notes(architecture)
    elif to == "huggingface":
        yield from _huggingface_notes(architecture)
    if to != "run" and (source / CARD).is_file():
        yield f"{source / CARD} is not copied: the model card is written anew, see --license"


def _openclip_notes(architecture: Architecture) -> Iterator[str]:
    vision = architecture.json["vision_cfg"]
    changed = [key for key in TRUNK_KEYS if key in vision]
    if is_siglip(architecture) and changed:
        yield (
            f"open_clip does not read vision_cfg.{', '.join(changed)} beside a trunk of timm: it "
            f"builds {vision['timm_model_name']} as it is, whose features differ from these"
        )
    trunk, size = vision.get("timm_model_name"), architecture.vision.image_size
    if trunk and not changed and {*size} != {trunk_size(trunk)}:
        side = trunk_size(trunk)
        given = size[0] if size[0] == size[1] else size
        yield (
            f"open_clip builds {trunk} for {side} x {side} pixels, whatever vision_cfg.image_size "
            f"says: load this with create_model(..., load_weights=False, force_image_size={given}) "
            "and load_checkpoint (docs/fine-tuning.md)"
        )


def _huggingface_notes(architecture: Architecture) -> Iterator[str]:
    vision, text = architecture.vision, architecture.text
    if vision.patches_kept != vision.patches:
        yield "vision_cfg.patch_dropout is left out: config.json says nothing of training"
    if architecture.init_logit_bias is not None and not is_siglip(architecture):
        yield (
            "a CLIPModel has no logit_bias: its logits are without it; the file keeps it, and "
            "transformers reports it as unexpected"
        )
    line = text_length_line(architecture)
    if line is not None:
        yield (
            f"the model takes {text.context_length} tokens, and transformers' zero-shot pipeline "
            f"pads texts of SigLIP to {PIPELINE_TOKENS}: with `classify` the pipeline, "
            f"write: {line}"
        )
