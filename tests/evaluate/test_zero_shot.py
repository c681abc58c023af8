import pytest
import torch
import torch.nn.functional as F

from parallel_clip.errors import InputError
from parallel_clip.evaluate.encoder import encode_pictures
from parallel_clip.evaluate.zero_shot import encode_classes, zero_shot
from tests.data.shard_files import write_shard
from tests.evaluate.world import ArithmeticEncoder, batches_of, on_ranks, some_samples

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
TEMPLATES = ["{}", "a photo of a {}.", "many {}"]


@pytest.fixture
def shard(tmp_path):
    return write_shard(tmp_path / "held-out.tar", some_samples(17))


def zero_shot_on(group, shard, names=NAMES):
    encoder = ArithmeticEncoder()
    classes = encode_classes(encoder, names, TEMPLATES, 4, group)
    return zero_shot(encoder, batches_of(shard, "labels", group), classes, group)


def test_a_class_is_the_mean_of_its_prompts():
    encoder = ArithmeticEncoder()
    classes = encode_classes(encoder, NAMES, TEMPLATES, batch=4)
    assert encoder.texts_encoded == len(NAMES) * len(TEMPLATES)
    for name, feature in zip(NAMES, classes, strict=True):
        prompts = encoder.encode_text(
            encoder.tokenizer([name, f"a photo of a {name}.", f"many {name}"])
        )
        assert torch.allclose(feature, F.normalize(prompts.mean(0), dim=0), atol=1e-6)


def test_top1_and_top5_are_those_of_topk(shard):
    encoder = ArithmeticEncoder()
    classes = encode_classes(encoder, NAMES, TEMPLATES)
    batches = batches_of(shard, "labels")
    images = torch.cat([encode_pictures(encoder, batch.images) for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    nearest = (images @ classes.T).topk(5).indices
    found = zero_shot_on(None, shard)
    assert found == {
        "top1": (nearest[:, 0] == labels).sum().item() / 17,
        "top5": (nearest == labels[:, None]).sum().item() / 17,
        "samples": 17,
        "classes": 7,
        "bad_samples": 0,
    }


@pytest.mark.parametrize("ranks", [2, 9])
def test_any_number_of_ranks_finds_the_same(tmp_path, shard, ranks):
    assert on_ranks(ranks, zero_shot_on, tmp_path, shard) == [zero_shot_on(None, shard)] * ranks


def test_a_label_beyond_the_classes_is_named_on_every_rank(tmp_path, shard):
    for error in on_ranks(2, zero_shot_on, tmp_path, shard, NAMES[:6]):
        assert isinstance(error, InputError)
        assert "0006" in str(error) and "held-out.tar" in str(error)
        assert "label 6" in str(error) and "0 to 5" in str(error)


def test_shards_without_labels(tmp_path):
    samples = some_samples(5)
    for files in samples.values():
        del files["cls"]
    shard = write_shard(tmp_path / "held-out.tar", samples)
    with pytest.raises(InputError, match="5 of 5 .*0000 of .*held-out.tar.*cls"):
        zero_shot_on(None, shard)
