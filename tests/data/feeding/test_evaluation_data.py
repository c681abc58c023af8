import pytest
import torch

from parallel_clip.data.feeding.evaluation_data import EvaluationData
from parallel_clip.data.samples.tokenizer import ClipTokenizer
from parallel_clip.data.samples.transforms import Preprocess
from parallel_clip.errors import InputError
from tests.data.shard_files import index_shards, picture, sample, write_shard

PREPROCESS = Preprocess((16, 16))
TOKENIZER = ClipTokenizer(12)


@pytest.fixture
def shards(tmp_path):
    """Samples 0 to 10 with 1, 2 or 3 captions and a class; 4 has no caption, 7 no class."""
    samples = {}
    for number in range(11):
        lines = [f"caption {number} {letter}" for letter in "abc"[: number % 3 + 1]]
        files = {"jpg": picture(number), "txt": "\n".join(lines).encode(), "cls": b"%d" % number}
        samples[f"{number:02d}"] = files
    del samples["04"]["txt"], samples["07"]["cls"]
    keys = list(samples)
    write_shard(tmp_path / "0.tar", {key: samples[key] for key in keys[:6]})
    write_shard(tmp_path / "1.tar", {key: samples[key] for key in keys[6:]})
    return str(tmp_path)


def open_data(shards, **options):
    return EvaluationData(index_shards(shards), PREPROCESS, TOKENIZER, **options)


@pytest.mark.parametrize("ranks, batch, workers", [(1, 4, 0), (1, 64, 1), (2, 3, 0), (3, 2, 2)])
def test_every_picture_comes_once_with_all_its_captions(shards, ranks, batch, workers):
    positions, captions = [], []
    for rank in range(ranks):
        data = open_data(shards, rank=rank, ranks=ranks, batch=batch, workers=workers)
        batches = list(data)
        assert data.samples == 11 and len(data) == len(batches)
        for part in batches:
            n = len(part.positions)
            assert part.images.shape == (n, 3, 16, 16) and n <= batch
            assert part.owner.tolist() == sorted(part.owner.tolist())
            positions += part.positions.tolist()
            captions += [
                (int(part.positions[row]), tuple(tokens.tolist()))
                for row, tokens in zip(part.owner, part.tokens, strict=True)
            ]
            assert [bad.key for bad in part.bad] in ([], ["04"])
            assert [int(address.key) for address in part.addresses] == part.positions.tolist()
    assert positions == [number for number in range(11) if number != 4]
    assert captions == [
        (number, tuple(TOKENIZER([f"caption {number} {letter}"])[0].tolist()))
        for number in positions
        for letter in "abc"[: number % 3 + 1]
    ]


@pytest.mark.parametrize("need", ["captions", "labels"])
def test_workers_give_the_same_bits(shards, need):
    alone, by_workers = (open_data(shards, batch=4, need=need, workers=n) for n in (0, 2))
    for one, other in zip(alone, by_workers, strict=True):
        for name in ("images", "positions", "tokens", "owner", "labels"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        assert (one.addresses, one.bad) == (other.addresses, other.bad)


def test_labels(shards):
    (batch,) = open_data(shards, need="labels")
    assert batch.labels.tolist() == batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]
    assert batch.tokens.shape == (0, 12)
    assert [(bad.position, bad.key) for bad in batch.bad] == [(7, "07")]


def test_a_batch_of_bad_samples_alone_is_empty(tmp_path):
    write_shard(tmp_path / "0.tar", {"a": {"txt": b"x"}, "b": sample(1)})
    first, second = open_data(str(tmp_path), batch=1)
    assert first.images.shape == (0, 3, 16, 16) and first.tokens.shape == (0, 12)
    assert len(first.bad) == 1 and len(second.images) == 1


def test_more_ranks_than_samples(tmp_path):
    write_shard(tmp_path / "0.tar", {"a": sample(1)})
    parts = [list(open_data(str(tmp_path), rank=rank, ranks=3)) for rank in range(3)]
    assert sorted(map(len, parts)) == [0, 0, 1]


def test_missing_shards(tmp_path):
    with pytest.raises(InputError, match="do not exist"):
        open_data(str(tmp_path / "none.tar"))
