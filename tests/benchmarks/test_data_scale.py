"""The sparse index of benchmarks/data_scale.py is one that the loader takes."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from parallel_clip.data.index.beside import INDEX_NAME
from parallel_clip.data.index.shard_table import find_shards
from parallel_clip.errors import InputError


@pytest.fixture
def data_scale(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("data_scale")


def test_a_sparse_index_tells_counts_and_no_places(data_scale, tmp_path):
    data_scale.write_sparse_index(tmp_path / INDEX_NAME, 30)
    table = find_shards(f"{tmp_path}/{{000000..000029}}.tar", lambda line: None)
    assert np.array_equal(table.counts, np.full(30, data_scale.SAMPLES))
    with pytest.raises(InputError, match="is damaged where it tells of"):
        table[7]
