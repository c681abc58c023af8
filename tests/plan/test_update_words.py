"""What is said of learning rates and weight decay."""

import pytest

from parallel_clip.config import Freeze, Optimizer
from parallel_clip.errors import InputError
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.plan.run_plan import make_run_plan
from parallel_clip.plan.update_words import update_words
from tests.plan.small_plans import small_config
from tests.small_models import KINDS

PLAIN = architecture_from_json(KINDS["plain"], "plain")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, []),
        ({"layer_decay": 1.0, "no_decay": ["*bias"]}, []),
        (
            {"lr": 1e-3, "lr_text": 1e-4, "layer_decay": {"vision": 0.5}},
            [
                "highest learning rates: vision 0.001 × 0.125 to 1 over 4 layer groups, "
                "text 0.0001, logit parameters 0.001"
            ],
        ),
        (
            {"lr_logit": 0.0, "no_decay": "openclip4"},
            [
                "highest learning rates: vision 0.0005, text 0.0005, logit parameters 0; "
                "no weight decay on norms, biases, logit parameters, "
                "visual.positional_embedding, positional_embedding"
            ],
        ),
        (
            {"no_decay": ["*resblocks*"]},
            [
                "no weight decay on norms, biases, logit parameters, "
                "visual.transformer.resblocks.*.attn.in_proj_weight, "
                "visual.transformer.resblocks.*.attn.out_proj.weight, "
                "visual.transformer.resblocks.*.mlp.c_fc.weight, "
                "visual.transformer.resblocks.*.mlp.c_proj.weight and 4 more"
            ],
        ),
    ],
)
def test_one_line_where_something_is_not_as_by_default(settings, words):
    assert update_words(PLAIN, Optimizer(**settings), Freeze()) == words


def test_of_a_frozen_tower_nothing_is_said():
    settings = Optimizer(layer_decay=0.5, no_decay="openclip4")
    assert update_words(PLAIN, settings, Freeze(vision="all")) == [
        "highest learning rates: text 0.0005 × 0.125 to 1 over 4 layer groups, "
        "logit parameters 0.0005; "
        "no weight decay on norms, biases, logit parameters, positional_embedding"
    ]
    decays = Optimizer(layer_decay={"text": 0.5})
    assert update_words(PLAIN, decays, Freeze(text="all")) == []


def test_a_plan_says_them_and_finds_a_pattern_without_a_match(tmp_path):
    config = small_config(tmp_path, 1)

    def plan(**settings):
        changed = config.model_copy(update={"optimizer": Optimizer(**settings)})
        return make_run_plan(changed, 1)[0]

    assert any(note.startswith("highest learning rates") for note in plan(layer_decay=0.9).notes)
    with pytest.raises(InputError, match="optimizer.no_decay"):
        plan(no_decay=["nothing"])
