"""Which pairs have equal identities, and that workers and layouts do not show in them."""

from __future__ import annotations

import json

import pytest
import torch

from parallel_clip.config import config_from_dict
from parallel_clip.data.feeding.loader import RankBatchSlice, TrainingLoader
from parallel_clip.data.feeding.open import build_training_data, check_samples
from parallel_clip.data.feeding.run_shards import find_run_shards
from parallel_clip.data.order.sample_order import SampleAddress
from parallel_clip.data.samples.identities import IdentityRule
from parallel_clip.data.samples.tokenizer import ClipTokenizer
from parallel_clip.data.samples.transforms import Preprocess
from parallel_clip.data.storage.progress import print_nothing
from parallel_clip.data.storage.shards import StoredSample
from parallel_clip.errors import InputError
from tests.data.shard_files import picture, write_shard


def identity(content: bytes | None, key: str = "url", index: int = 0) -> int:
    files = {} if content is None else {"json": content}
    return IdentityRule(key).of_sample(
        StoredSample("a", files), SampleAddress(0, 0, index, epoch=0)
    )


VALUES = [
    b'"a"', b'"b"', b"1", b'"1"', b"1.5", b"true", b'["a"]', b'{"x": 1, "y": 2}', b'"\\ud800"',
]  # fmt: skip
WITHOUT = [
    None, b"no json", b'["url"]', b'{"Url": 1}', b'{"url": null}', b'{"url": ""}', b'{"url": NaN}',
]  # fmt: skip


def test_values_are_the_same_where_their_json_is():
    found = [identity(b'{"other": 3, "url": ' + value + b"}") for value in VALUES]
    assert len(set(found)) == len(VALUES)
    assert all(-(2**63) <= number < 2**63 for number in found) and min(found) < 0 < max(found)
    again = [identity(b'\xef\xbb\xbf{"url":' + value + b" }", index=5) for value in VALUES]
    assert again == found
    assert identity(b'{"url": {"y": 2, "x": 1}}') == found[VALUES.index(b'{"x": 1, "y": 2}')]


@pytest.mark.parametrize("content", WITHOUT)
def test_a_sample_without_a_value_is_a_duplicate_of_itself_alone(content):
    first, second = identity(content, index=3), identity(content, index=4)
    assert first == identity(b"{}", index=3) != second


CAPTIONS = ["red dog", "Red  DOG", "cat", "dog red", "cat", "one two three four five six seven",
            "one two three four five six eight"]  # fmt: skip


@pytest.fixture
def shards(tmp_path):
    """Seven samples, the last two alike in their first eight tokens, and one that is bad."""
    for shard, part in enumerate((range(4), range(4, 7))):
        samples = {}
        for n in part:
            facts = json.dumps({"id": n % 3} if n < 5 else {}).encode()
            samples[f"{n}"] = {"jpg": picture(n), "txt": CAPTIONS[n].encode(), "json": facts}
        if shard:
            samples["bad"] = {"jpg": b"no picture", "txt": b"lost", "json": b'{"id": 7}'}
        write_shard(tmp_path / f"{shard}.tar", samples)
    return tmp_path


def open_data(shards, duplicates, **data):
    tree = {"train": {"steps": 1}, "loss": {"duplicates": duplicates}}
    config = config_from_dict(tree | {"data": {"train": [{"shards": str(shards)}], **data}})
    found = find_run_shards(config, print_nothing)
    check_samples(config, found)
    return build_training_data(config, found, Preprocess((16, 16)), ClipTokenizer(8))


@pytest.mark.parametrize("duplicates", ["tokens", "key:id"])
def test_pairs_are_duplicates_alike_in_every_layout(shards, duplicates):
    data = open_data(shards, duplicates)
    whole = data[range(24)]
    assert whole.identities.dtype == torch.int64 and whole.identities.shape == (24,)
    assert whole.bad, "a substitute has an identity of its own"
    for row, own in enumerate(zip(whole.tokens, whole.addresses, strict=True)):
        for other, (tokens, address) in enumerate(zip(whole.tokens, whole.addresses, strict=True)):
            if duplicates == "tokens":
                equal = torch.equal(own[0], tokens)
            elif int(own[1].key) < 5 and int(address.key) < 5:
                equal = int(own[1].key) % 3 == int(address.key) % 3
            else:
                equal = own[1] == address
            assert (whole.identities[row] == whole.identities[other]) == equal
    for rank in range(2):
        for step in TrainingLoader(data, RankBatchSlice(12, 3, rank, 2), 0, 2, workers=1):
            for batch in step:
                assert torch.equal(batch.identities, whole.identities[batch.positions])


@pytest.mark.parametrize("duplicates", ["tokens", "key:id"])
def test_each_of_several_captions_has_an_identity(tmp_path, duplicates):
    for n, lines in enumerate((b"red dog\ncat", b"cat\ndog", b"cat")):
        files = {"jpg": picture(n), "txt": lines, "json": b'{"id": %d}' % (n // 2)}
        write_shard(tmp_path / f"{n}.tar", {f"{n}": files})
    several = {"caption_lines": True, "captions_per_image": 2, "augment": "none"}
    batch = open_data(tmp_path, duplicates, **several)[range(3)]
    keys = [int(address.key) for address in batch.addresses]
    expected = {"tokens": [["red", "cat"], ["cat", "dog"], ["cat", "cat"]],
                "key:id": [[0, 0], [0, 0], [1, 1]]}[duplicates]  # fmt: skip
    names = [name for key in keys for name in expected[key]]
    assert batch.identities.shape == (6,) and len(batch.tokens) == 6
    for one, name in zip(batch.identities, names, strict=True):
        same = [number for number, other in enumerate(names) if other == name]
        assert (batch.identities == one).nonzero().flatten().tolist() == same


def test_nothing_is_hashed_where_it_is_not_asked_for(shards):
    assert open_data(shards, "none")[range(8)].identities is None


def test_a_key_that_is_nowhere_is_told(shards):
    with pytest.raises(InputError, match="key:ID: none of the first 8 samples has a value at 'ID'"):
        open_data(shards, "key:ID")
