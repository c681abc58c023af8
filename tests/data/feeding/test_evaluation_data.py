import pytest
import torch

from parallel_clip.config import config_from_dict
from parallel_clip.data.feeding.evaluation_data import EvaluationData
from parallel_clip.data.feeding.open import build_held_out_data, check_samples
from parallel_clip.data.feeding.run_shards import find_run_shards
from parallel_clip.data.samples.captions import CaptionRule
from parallel_clip.data.samples.decode import PictureRule, decode_picture
from parallel_clip.data.samples.tokenizer import ClipTokenizer
from parallel_clip.data.samples.transforms import Preprocess, evaluation_transform, normalize
from parallel_clip.data.storage.progress import print_nothing
from parallel_clip.data.storage.shards import ShardFiles
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


def test_pictures_are_bytes_that_become_those_of_the_transform(shards):
    data = open_data(shards, need="labels", batch=2)
    transform, files = evaluation_transform(PREPROCESS), ShardFiles()
    first = data.shards[0]
    expected = [transform(decode_picture(files.read(first, n), PictureRule())) for n in range(2)]
    batch = next(iter(data))
    assert batch.images.dtype == torch.uint8
    assert torch.equal(normalize(batch.images, PREPROCESS), torch.stack(expected))


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


def test_captions_of_several_keys_are_those_of_the_most_probable(tmp_path):
    facts = [b'{"alt": ["x", "y"], "caption": "z"}', b'{"caption": "z"}', b'{"alt": ""}']
    samples = {f"{n}": {"jpg": picture(n), "json": json} for n, json in enumerate(facts)}
    write_shard(tmp_path / "0.tar", samples)
    rule = CaptionRule({"caption": 0.3, "alt": 0.7})
    (batch,) = open_data(str(tmp_path), captions=rule)
    assert torch.equal(batch.tokens, TOKENIZER(["x", "y", "z"]))
    assert batch.owner.tolist() == [0, 0, 1]
    assert [bad.key for bad in batch.bad] == ["2"]


def test_a_config_says_which_captions_and_pictures_are_evaluated(tmp_path):
    facts = b'{"alt": "a\\nb", "caption": "z"}'
    samples = {"0": {"jpg": picture(0), "json": facts}, "1": {"jpg": picture(1), "txt": b"x\ny"}}
    shards = str(write_shard(tmp_path / "0.tar", samples))

    def evaluated(**data):
        settings = {"train": [{"shards": shards}], **data}
        tree = {"train": {"steps": 1}, "data": settings, "evaluate": {"retrieval": shards}}
        config = config_from_dict(tree)
        found = find_run_shards(config, print_nothing)
        check_samples(config, found)
        (batch,) = build_held_out_data(config, found, PREPROCESS, TOKENIZER)["retrieval"]
        return batch.tokens

    assert torch.equal(evaluated(), TOKENIZER(["x", "y"]))
    assert torch.equal(evaluated(empty_caption="keep"), TOKENIZER(["x", "y"]))
    keys = {"caption": 1, "alt": 2}
    assert torch.equal(evaluated(caption_key=keys), TOKENIZER(["a\nb"]))
    with pytest.raises(InputError, match=r"at most 431 \(data.max_pixels\)"):
        evaluated(max_pixels=431)


def test_pixels_are_bounded_before_and_after_the_resize(tmp_path):
    """16 pixels high, a picture of 24 x 1 has 6,144."""
    samples = {"0": {"png": picture(0, (24, 1), "PNG"), "txt": b"a"}, "1": sample(1)}
    write_shard(tmp_path / "0.tar", samples)
    for most, bad in ((6144, []), (6143, ["0"]), (431, ["0", "1"])):
        (batch,) = open_data(str(tmp_path), max_pixels=most)
        assert [sample.key for sample in batch.bad] == bad
    squash = Preprocess((16, 16), resize_mode="squash")
    (batch,) = EvaluationData(index_shards(str(tmp_path)), squash, TOKENIZER, max_pixels=432)
    assert not batch.bad


def test_more_ranks_than_samples(tmp_path):
    write_shard(tmp_path / "0.tar", {"a": sample(1)})
    parts = [list(open_data(str(tmp_path), rank=rank, ranks=3)) for rank in range(3)]
    assert sorted(map(len, parts)) == [0, 0, 1]


def test_missing_shards(tmp_path):
    with pytest.raises(InputError, match="do not exist"):
        open_data(str(tmp_path / "none.tar"))
