"""Pieces written by any number of writers along any axis, read in any range."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from parallel_clip.checkpoint import pieces
from parallel_clip.checkpoint.durable import hash_file
from parallel_clip.checkpoint.manifest import MANIFEST_FILE, Manifest
from parallel_clip.checkpoint.pieces import Piece, PieceReader, host_copy, write_index, write_pieces
from parallel_clip.errors import InputError


def write(folder: Path, tensors: dict[str, tuple[torch.Tensor, int, list[int]]], writers: int = 1):
    """Each tensor cut along an axis at the given places, dealt to writers in turn."""
    hands: list[list[Piece]] = [[] for _ in range(writers)]
    turn = 0
    for key, (tensor, axis, cuts) in tensors.items():
        ends = [*cuts, tensor.shape[axis] if tensor.ndim else 0]
        for start, end in zip([0, *cuts], ends, strict=True):
            piece = tensor.narrow(axis, start, end - start) if tensor.ndim else tensor
            piece = Piece(key, host_copy(piece), tuple(tensor.shape), axis, start)
            hands[turn % writers].append(piece)
            turn += 1
    written = [write_pieces(folder, rank, hand) for rank, hand in enumerate(hands)]
    write_index(folder, [entry for of_rank in reversed(written) for entry in of_rank.entries])
    write_manifest(folder)


def write_manifest(folder: Path) -> None:
    """The manifest of the files as they are."""
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    Manifest({file.name: hash_file(file) for file in folder.iterdir()}).write(folder)


@given(data=st.data())
def test_any_range_of_any_cut(data):
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3), label="shape")
    axis = data.draw(st.integers(0, len(shape) - 1), label="cut along")
    cuts = sorted(data.draw(st.sets(st.integers(1, shape[axis])), label="at") - {shape[axis]})
    tensor = torch.randn(shape)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), {"weight:a": (tensor, axis, cuts)}, writers=3)
        reader = PieceReader(Path(folder))
        assert reader.shape("weight:a") == tuple(shape)
        assert torch.equal(reader.read("weight:a"), tensor)
        along = data.draw(st.integers(0, len(shape) - 1), label="read along")
        start = data.draw(st.integers(0, shape[along] - 1), label="from")
        length = data.draw(st.integers(1, shape[along] - start), label="so many")
        part = reader.read_range("weight:a", along, start, length)
        assert torch.equal(part, tensor.narrow(along, start, length))


def test_single_numbers_views_and_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "FILE_BYTES", 100)
    whole = torch.arange(60.0).view(6, 10)
    tensors = {
        "weight:scale": (torch.tensor(4.6), 0, []),
        "weight:a": (whole.t(), 1, [2, 3]),
        "exp_avg:a": (whole[:, 3:5], 0, [1]),
    }
    write(tmp_path, tensors)
    assert len(list(tmp_path.glob("rank_00000_*.safetensors"))) > 1
    reader = PieceReader(tmp_path)
    assert sorted(reader.keys()) == sorted(tensors)
    for key, (tensor, _, _) in tensors.items():
        assert torch.equal(reader.read(key), tensor)


def test_a_piece_is_a_copy(tmp_path):
    tensor = torch.zeros(4)
    piece = Piece("weight:a", host_copy(tensor), (4,))
    tensor.fill_(1)
    write_index(tmp_path, write_pieces(tmp_path, 0, [piece]).entries)
    write_manifest(tmp_path)
    assert torch.equal(PieceReader(tmp_path).read("weight:a"), torch.zeros(4))


# ------------------------------------------------------------------------------------- damage

WHOLE = torch.arange(12.0).view(4, 3)


@pytest.fixture
def checkpoint(tmp_path):
    tensors = {"weight:a": (WHOLE, 0, [2]), "weight:scale": (torch.tensor(1.0), 0, [])}
    write(tmp_path, tensors, writers=2)
    return tmp_path


def edit_index(folder: Path, edit) -> None:
    file = folder / "index.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def cut_file_short(folder: Path) -> None:
    file = folder / "rank_00001_000.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def write_other_tensors(folder: Path) -> None:
    save_file({"other": torch.zeros(2)}, folder / "rank_00001_000.safetensors")


DAMAGE = {
    "no index": lambda folder: (folder / "index.json").unlink(),
    "index cut short": lambda folder: (folder / "index.json").write_text('{"weight:a": {"sh'),
    "index of another kind": lambda folder: (folder / "index.json").write_text("[1, 2]"),
    "no shape": lambda folder: edit_index(folder, lambda c: c["weight:a"].pop("shape")),
    "tensor not in the index": lambda folder: edit_index(folder, lambda c: c.pop("weight:a")),
    "piece not in the index": lambda folder: edit_index(
        folder, lambda c: c["weight:a"]["pieces"].pop()
    ),
    "no file": lambda folder: (folder / "rank_00001_000.safetensors").unlink(),
    "file cut short": cut_file_short,
    "file of nothing": lambda folder: (folder / "rank_00001_000.safetensors").write_bytes(b""),
    "file of other tensors": write_other_tensors,
    "larger shape": lambda folder: edit_index(folder, lambda c: c["weight:a"].update(shape=[5, 3])),
    "other shape": lambda folder: edit_index(folder, lambda c: c["weight:a"].update(shape=[4, 2])),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(checkpoint, damage):
    DAMAGE[damage](checkpoint)
    write_manifest(checkpoint)  # as if it had been written so
    with pytest.raises(InputError, match="whole|damaged") as error:
        PieceReader(checkpoint).read("weight:a")
    assert str(checkpoint) in str(error.value)


def test_a_file_outside_the_checkpoint_is_refused(checkpoint, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    save_file({"weight:a@0": WHOLE}, elsewhere / "x.safetensors")
    edit_index(
        checkpoint,
        lambda c: c["weight:a"]["pieces"][0].update(file=f"../{elsewhere.name}/x.safetensors"),
    )
    write_manifest(checkpoint)
    with pytest.raises(InputError):
        PieceReader(checkpoint).read("weight:a")
