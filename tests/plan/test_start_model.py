"""Which model a run trains."""

import pytest

from parallel_clip.errors import InputError
from parallel_clip.model.known_models import load_architecture
from parallel_clip.plan.run_plan import make_run_plan
from parallel_clip.plan.start_model import check_trainable
from tests.plan.small_plans import small_config
from tests.small_models import KINDS


def test_what_is_drawn_at_random_in_training_is_refused_unless_it_is_overridden(tmp_path):
    model = KINDS["timm-mobile-clip"]
    vision = model["vision_cfg"] | {"timm_drop_path": 0.1}
    text = model["text_cfg"] | {"vocab_size": 49408}
    config = small_config(tmp_path, 1, model=model | {"vision_cfg": vision, "text_cfg": text})
    with pytest.raises(InputError, match=r"stochastic depth.*model.override=\[timm_drop_path\]"):
        make_run_plan(config, 1)
    named = config.model.model_copy(update={"override": ["timm_drop_path"]})
    plan, _ = make_run_plan(config.model_copy(update={"model": named}), 1)
    assert plan.architecture.vision.drop_path == 0.1, "as the JSON has it"


def test_known_models_without_it_are_trainable():
    with pytest.raises(InputError, match="timm_drop_path 0.1"):
        check_trainable(load_architecture("MobileCLIP2-L-14"), [])
    for name in ("MobileCLIP2-L-14", "ViT-B-16-SigLIP", "ViT-B-32"):
        check_trainable(load_architecture(name), ["vision_cfg.timm_drop_path"])
