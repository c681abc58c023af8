import pytest
import torch

from parallel_clip.errors import InputError
from parallel_clip.evaluate.held_out import held_out_loss
from parallel_clip.evaluate.retrieval import encode_pairs, retrieval
from tests.data.shard_files import write_shard
from tests.evaluate.world import ArithmeticEncoder, batches_of, on_ranks, some_samples

PICTURES = 17


@pytest.fixture
def shard(tmp_path):
    return write_shard(tmp_path / "held-out.tar", some_samples(PICTURES))


def features_on(group, shard):
    return encode_pairs(ArithmeticEncoder(), batches_of(shard, "captions", group), 4, group)


def retrieval_on(group, shard):
    return retrieval(features_on(group, shard))


def test_features_are_those_of_the_samples_one_by_one(shard):
    features = features_on(None, shard)
    encoder = ArithmeticEncoder()
    texts = [f"caption {i} of picture {n}" for n in range(PICTURES) for i in range(n % 3 + 1)]
    assert features.images.shape == (PICTURES, 8)
    assert torch.equal(features.texts, encoder.encode_text(encoder.tokenizer(texts)))
    assert features.owner.tolist() == [n for n in range(PICTURES) for _ in range(n % 3 + 1)]
    first = [f"caption 0 of picture {n}" for n in range(PICTURES)]
    assert torch.equal(features.first_captions(), encoder.encode_text(encoder.tokenizer(first)))


def test_the_result_has_the_keys_of_the_contract(shard):
    found = retrieval_on(None, shard)
    names = [f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    assert set(found) == {*names, "images", "texts", "bad_samples"}
    assert found["images"] == PICTURES and found["texts"] == 33
    assert found["bad_samples"] == 0


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_finds_the_same(tmp_path, shard, ranks):
    assert on_ranks(ranks, retrieval_on, tmp_path, shard) == [retrieval_on(None, shard)] * ranks


def test_more_ranks_than_pictures(tmp_path):
    shard = write_shard(tmp_path / "two.tar", some_samples(2))
    assert on_ranks(3, retrieval_on, tmp_path, shard) == [retrieval_on(None, shard)] * 3


def test_a_sample_without_captions_is_named_on_every_rank(tmp_path):
    samples = some_samples(6)
    del samples["0004"]["txt"]
    shard = write_shard(tmp_path / "held-out.tar", samples)
    for error in on_ranks(2, retrieval_on, tmp_path, shard):
        assert isinstance(error, InputError)
        assert "1 of 6" in str(error) and "0004" in str(error) and "held-out.tar" in str(error)


def test_few_bad_samples_are_left_out_and_counted(tmp_path, caplog):
    samples = some_samples(120)
    samples["0100"]["png"] = b"broken"
    shard = write_shard(tmp_path / "held-out.tar", samples)
    found = retrieval_on(None, shard)
    assert (found["images"], found["bad_samples"]) == (119, 1)
    assert "0100" in caplog.text


def test_loss_of_equally_large_batches(shard):
    features = features_on(None, shard)
    found = held_out_loss(features, "infonce", logit_scale=20.0, batch=5)
    assert (found["batch"], found["pairs"]) == (5, 15)
    assert found["loss"] == pytest.approx(plain_loss(features, "infonce", 5), rel=1e-6)
    whole = held_out_loss(features, "infonce", logit_scale=20.0, batch=64)
    assert (whole["batch"], whole["pairs"]) == (PICTURES, PICTURES)
    assert whole["loss"] > found["loss"], "more pictures to choose from"


def test_sigmoid_loss(shard):
    features = features_on(None, shard)
    found = held_out_loss(features, "sigmoid", logit_scale=20.0, logit_bias=-10.0, batch=5)
    assert found["loss"] == pytest.approx(plain_loss(features, "sigmoid", 5), rel=1e-6)


def plain_loss(features, kind: str, batch: int) -> float:
    """By open_clip's own losses."""
    loss = pytest.importorskip("open_clip.loss")
    images, texts = features.images, features.first_captions()
    losses = []
    for start in range(0, len(images) - batch + 1, batch):
        own = slice(start, start + batch)
        scale = torch.tensor(20.0)
        if kind == "infonce":
            losses.append(loss.ClipLoss()(images[own], texts[own], scale))
        else:
            bias = torch.tensor(-10.0)
            losses.append(loss.SigLipLoss()(images[own], texts[own], scale, bias))
    return torch.stack(losses).mean().item()
