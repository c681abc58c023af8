"""What stages hand on: shapes of each part, one length for all messages, and packing."""

from dataclasses import replace

import pytest
import torch

from parallel_clip.model.handover import Handover, MessageLayout
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.stages.stage import LayerRange, Stage
from tests.small_models import small_model

PAIRS = 3


def layout(sequence_ranks: int = 1) -> MessageLayout:
    """Four stages: the text tower (13 tokens of width 32) ends on the second and the image tower
    (17 tokens of width 48, 10 of 16 patches in training) on the last."""
    cfg = small_model({"patch_dropout": 0.4, "layers": 4}, {"layers": 2})
    text = [LayerRange(0, 1, 2), LayerRange(1, 2, 2), LayerRange(2, 2, 2), LayerRange(2, 2, 2)]
    stages = tuple(Stage(n, 4, LayerRange(n, n + 1, 4), text[n]) for n in range(4))
    return MessageLayout(architecture_from_json(cfg, "small"), stages, sequence_ranks)


@pytest.mark.parametrize(
    ("sequence_ranks", "training", "image_tokens", "text_tokens"),
    [(1, True, 10, 13), (1, False, 17, 13), (2, True, 5, 7), (2, False, 9, 7)],
)
def test_hidden_states_until_a_tower_ends_then_features(
    sequence_ranks, training, image_tokens, text_tokens
):
    messages = layout(sequence_ranks)
    first, second, *_ = (messages.of(stage, PAIRS, training) for stage in messages.stages)
    assert first == Handover((image_tokens, PAIRS, 48), (text_tokens, PAIRS, 32))
    assert second == Handover((image_tokens, PAIRS, 48), (PAIRS, 24))
    assert messages.length(PAIRS, training) == PAIRS * (image_tokens * 48 + text_tokens * 32)


def test_in_training_there_are_as_many_texts_as_captions():
    messages = replace(layout(), captions=5)
    first, second, *_ = (messages.of(stage, PAIRS, training=True) for stage in messages.stages)
    assert first == Handover((10, PAIRS, 48), (13, 5 * PAIRS, 32))
    assert second == Handover((10, PAIRS, 48), (5 * PAIRS, 24))
    assert messages.length(PAIRS, True) == PAIRS * (10 * 48 + 5 * 13 * 32)
    assert messages.of(messages.stages[0], PAIRS, False) == Handover(
        (17, PAIRS, 48), (13, PAIRS, 32)
    )


def test_nothing_is_handed_on_before_a_tower_starts():
    stage = Stage(0, 2, LayerRange(0, 2, 4), LayerRange(0, 0, 2))
    assert layout().of(stage, PAIRS, training=True).text is None


def test_a_message_is_filled_up_and_taken_apart():
    handover = Handover((2, PAIRS, 4), (PAIRS, 5))
    vision, text = torch.randn(2, PAIRS, 4), torch.randn(PAIRS, 5)
    message = handover.pack(vision, text, 50)
    assert message.shape == (50, 1, 1) and not message[39:].any()
    assert all(map(torch.equal, handover.unpack(message), (vision, text)))
