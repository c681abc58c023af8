import io
import random
from collections import Counter

import pytest
import torch
from PIL import Image

from parallel_clip.config import Config, Data, DataSource
from parallel_clip.config.keys import Batch
from parallel_clip.data.feeding import loader as loader_module
from parallel_clip.data.feeding.loader import RankBatchSlice, TrainingLoader
from parallel_clip.data.feeding.open import build_training_data
from parallel_clip.data.feeding.run_shards import find_run_shards
from parallel_clip.data.feeding.training_data import BadSample, Microbatch
from parallel_clip.data.samples.captions import CaptionRule
from parallel_clip.data.samples.decode import decode_picture
from parallel_clip.data.samples.tokenizer import ClipTokenizer
from parallel_clip.data.samples.transforms import Preprocess, evaluation_transform
from parallel_clip.data.storage.progress import print_nothing
from parallel_clip.data.storage.shards import ShardFiles
from parallel_clip.errors import BadDataError, InputError
from tests.data.shard_files import index_shards, picture, sample, write_shard, write_shards

PREPROCESS = Preprocess((16, 16))
TOKENIZER = ClipTokenizer(12)


def source(shards, weight=1.0, samples=None):
    return DataSource(shards=str(shards), weight=weight, samples=samples)


def open_data(*sources, seed=0, batch=24, augment="train", decode="exact", **options):
    data = Data(
        train=list(sources),
        augment=augment,
        augment_options=options,
        decode=decode,
        normalize="worker",
    )
    config = Config(data=data, seed=seed, batch=Batch(**{"global": batch}))
    shards = find_run_shards(config, print_nothing)
    return build_training_data(config, shards, PREPROCESS, TOKENIZER)


def load(data, global_batch, micro, rank=0, ranks=1, first_step=0, steps=5, **options):
    step_slice = RankBatchSlice(global_batch, micro, rank, ranks)
    return list(TrainingLoader(data, step_slice, first_step, steps, **options))


def joined(batches: list[Microbatch]) -> Microbatch:
    return loader_module._join(batches, pin=False) if len(batches) > 1 else batches[0]


def assert_same(one: Microbatch, other: Microbatch) -> None:
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.positions, other.positions)
    assert (one.addresses, one.bad) == (other.addresses, other.bad)


@pytest.fixture
def shards(tmp_path):
    """30 samples, one of them bad."""
    write_shards(tmp_path / "shards", [13, 7])
    samples = {f"{number:05d}": dict(sample(number)) for number in range(20, 30)}
    samples["00024"]["jpg"] = b"no picture"
    write_shard(tmp_path / "shards" / "000002.tar", samples)
    return tmp_path / "shards"


def test_a_batch_is_what_its_positions_say(shards):
    data = open_data(source(shards), augment="none")
    (step,) = load(data, 8, 4, first_step=1, steps=2)
    assert [batch.positions.tolist() for batch in step] == [[8, 9, 10, 11], [12, 13, 14, 15]]
    indexes, files = index_shards(str(shards)), ShardFiles()
    transform = evaluation_transform(PREPROCESS)
    for batch in step:
        assert batch.images.shape == (4, 3, 16, 16) and batch.images.dtype == torch.float32
        assert batch.tokens.shape == (4, 12) and batch.tokens.dtype == torch.int64
        for row, position in enumerate(batch.positions.tolist()):
            address = data.order.at(position)
            stored = files.read(indexes[address.shard], address.index)
            if batch.bad and batch.bad[0].position == position:
                continue
            assert torch.equal(batch.images[row], transform(decode_picture(stored)))
            assert torch.equal(batch.tokens[row], TOKENIZER(CaptionRule().captions_of(stored))[0])
            assert batch.addresses[row] == (0, indexes[address.shard].path, stored.key)


@pytest.mark.parametrize("augment", ["train", "none"])
@pytest.mark.parametrize(
    "ranks, micro, workers", [(1, 24, 0), (1, 6, 2), (2, 12, 1), (4, 2, 0), (3, 8, 2)]
)
def test_batches_do_not_depend_on_ranks_workers_or_microbatches(
    shards, monkeypatch, augment, ranks, micro, workers
):
    expected = load(open_data(source(shards), augment=augment), 24, 24)
    monkeypatch.setattr(loader_module, "MAX_PIECE", 5)
    random.seed(7)
    torch.manual_seed(7)
    data = open_data(source(shards), augment=augment)
    by_rank = [
        load(data, 24, micro, rank, ranks, workers=workers, prefetch=1) for rank in range(ranks)
    ]
    for step, (whole,) in enumerate(expected):
        parts = [batch for batches in by_rank for batch in batches[step]]
        assert len(parts) == 24 // micro
        assert_same(joined(parts), whole)
    assert sum(len(whole.bad) for (whole,) in expected) == 4


def test_a_loader_starts_at_any_step(shards):
    data = open_data(source(shards))
    whole, rest = load(data, 10, 5, steps=7), load(data, 10, 5, first_step=4, steps=7, workers=1)
    assert len(rest) == len(TrainingLoader(data, RankBatchSlice(10, 5), 4, 7)) == 3
    for expected, resumed in zip(whole[4:], rest, strict=True):
        for one, other in zip(expected, resumed, strict=True):
            assert_same(one, other)


def test_every_sample_comes_once_an_epoch(tmp_path):
    write_shards(tmp_path / "once", [7, 4])
    write_shards(tmp_path / "thrice", [6])
    data = open_data(source(tmp_path / "once"), source(tmp_path / "thrice", weight=3.0, samples=5))
    assert data.order.orders[0].samples_per_epoch == 11 + 3 * 5
    read = [a for (batch,) in load(data, 13, 13, steps=6) for a in batch.addresses]
    for epoch in range(3):
        times = Counter(read[26 * epoch : 26 * (epoch + 1)])
        assert Counter(times.values()) == {1: 11, 3: 5}
        assert {address.source for address, count in times.items() if count == 3} == {1}
    assert read[:26] != read[26:52]


def test_augmentation_is_the_positions_own(shards):
    one, other = open_data(source(shards), seed=1), open_data(source(shards), seed=2)
    n = one.order.orders[0].samples_per_epoch
    first_epoch = {a.key: image for a, image in rows(one, range(n))}
    second_epoch = {a.key: image for a, image in rows(one, range(n, 2 * n))}
    other_seed = {a.key: image for a, image in rows(other, range(n))}
    different = [
        not torch.equal(image, epoch[key])
        for epoch in (second_epoch, other_seed)
        for key, image in first_epoch.items()
    ]
    assert sum(different) > 40


def rows(data, positions):
    batch = data[positions]
    return zip(batch.addresses, batch.images, strict=True)


def test_fast_decoding_changes_pixels_a_little_and_nothing_else(tmp_path):
    samples = {f"{n}": {"jpg": smooth(n), "txt": b"a"} for n in range(3)}
    write_shard(tmp_path / "a.tar", samples)
    exact, fast = (open_data(source(tmp_path), decode=how)[range(3)] for how in ("exact", "fast"))
    assert exact.addresses == fast.addresses and torch.equal(exact.tokens, fast.tokens)
    assert not torch.equal(exact.images, fast.images)
    assert (exact.images - fast.images).abs().mean() < 0.1


def smooth(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").rotate(30 * number).resize((400, 300)).save(buffer, "JPEG")
    return buffer.getvalue()


def huge() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (20000, 9000)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "files, reason",
    [
        ({"jpg": picture(0, (64, 64))[:-500], "txt": b"a"}, "truncated"),
        ({"jpg": b"GIF89a", "txt": b"a"}, "not a JPEG"),
        ({"png": huge(), "txt": b"a"}, "data.max_pixels"),
        ({"jpg": picture(0), "txt": b" \n"}, "caption is empty"),
        ({"jpg": picture(0), "txt": b"\xff\xfe"}, "not UTF-8"),
        ({"jpg": picture(0)}, "no .txt"),
        ({"txt": b"a"}, "no picture"),
    ],
)
def test_a_bad_sample_is_replaced_and_told_of(tmp_path, files, reason):
    good = {f"{number:05d}": sample(number) for number in range(9)}
    path = write_shard(tmp_path / "a.tar", {**good, "the/bad": files})
    data = open_data(source(tmp_path))
    batch = data[range(10)]
    (bad,) = batch.bad
    assert isinstance(bad, BadSample) and reason in bad.reason
    assert (bad.source, bad.shard, bad.key) == (0, str(path), "the/bad")
    assert "the/bad" in str(bad) and str(path) in str(bad)
    keys = [address.key for address in batch.addresses]
    assert keys[bad.position] == keys[data.order.orders[0].substitute(bad.position, 1)]
    assert set(keys) == set(good)
    assert data.order.at(bad.position).index == 9


def test_substitutes_that_are_bad_too_are_passed_over(tmp_path):
    samples = {f"{number:05d}": {"txt": b"no picture"} for number in range(12)}
    write_shard(tmp_path / "a.tar", {**samples, "good": sample(1)})
    batch = open_data(source(tmp_path))[range(13)]
    assert {address.key for address in batch.addresses} == {"good"}
    assert len(batch.bad) == 12


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_ends_where_nothing_is_good(tmp_path, workers):
    write_shard(tmp_path / "a.tar", {"only": {"jpg": b"x", "txt": b"a"}})
    with pytest.raises(BadDataError) as caught:
        load(open_data(source(tmp_path)), 1, 1, workers=workers)
    assert str(caught.value).startswith(
        f"sample only of {tmp_path / 'a.tar'} (position 0): .jpg is"
    )
    assert "Traceback" not in str(caught.value)


def test_loading_leaves_the_global_generators_alone(shards):
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate()
    load(open_data(source(shards)), 8, 8, steps=2, workers=1)
    load(open_data(source(shards)), 8, 8, steps=2)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


def test_data_that_cannot_be_opened(shards, tmp_path):
    with pytest.raises(InputError, match="data.train names no shards"):
        open_data()
    with pytest.raises(InputError, match="do not exist"):
        open_data(source(shards), source(tmp_path / "none.tar"))
    with pytest.raises(InputError, match="use_timm is not supported"):
        open_data(source(shards), use_timm=True)
