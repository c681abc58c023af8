"""Files of each container, the one that is taken from a folder, and OpenAI's archives."""

import json
import pickle
import struct
import zipfile

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from parallel_clip.convert.model_weights import ModelWeights
from parallel_clip.convert.open import open_source
from parallel_clip.convert.tensor_files import open_tensor_file
from parallel_clip.convert.torchscript import is_torchscript, read_torchscript
from parallel_clip.errors import InputError
from tests import reference
from tests.small_models import small_model

# As OpenAI's are: QuickGELU, heads 64 wide.
OPENAI = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 2, "width": 64},
    "text_cfg": {"context_length": 13, "vocab_size": 101, "width": 128, "heads": 2, "layers": 3},
}
NUMBERS = {"input_resolution": 32, "context_length": 13, "vocab_size": 101}


def write_safetensors(state, path):
    save_file(state, path)


def write_torch(state, path):
    torch.save(state, path)


def write_torch_legacy(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


def write_torchscript(state, path):
    """A module with these parameters by their names; what it computes does not matter."""

    class Node(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    root = Node()
    for name, tensor in state.items():
        node, *parts = root, *name.split(".")
        for part in parts[:-1]:
            if not hasattr(node, part):
                node.add_module(part, Node())
            node = getattr(node, part)
        node.register_buffer(parts[-1], tensor)
    torch.jit.save(torch.jit.script(root), path)


CONTAINERS = {
    "safetensors": ("x.safetensors", write_safetensors),
    "torch": ("x.pt", write_torch),
    "torch legacy": ("x.bin", write_torch_legacy),
    "torchscript": ("x.pt", write_torchscript),
}


@pytest.fixture(scope="module")
def state():
    state = reference.random_weights(small_model(), seed=1)
    return {name: tensor.half() for name, tensor in state.items()}


@pytest.mark.parametrize("container", CONTAINERS)
def test_each_container_gives_the_same_tensors(tmp_path, state, container):
    name, write = CONTAINERS[container]
    write(state, tmp_path / name)
    file = open_tensor_file(tmp_path / name)
    assert file.shapes() == {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name, tensor in state.items():
        assert file.read(name).dtype == torch.float16 and torch.equal(file.read(name), tensor)


DAMAGES = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "cut at its end": lambda content: content[:-30],
    "garbage at its start": lambda content: b"garbage!" + content[8:],
    "garbage": lambda content: b"garbage" * 1000,
    "text": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("container", CONTAINERS)
def test_a_damaged_file_is_named(tmp_path, state, container, damage):
    name, write = CONTAINERS[container]
    write(state, tmp_path / name)
    (tmp_path / name).write_bytes(DAMAGES[damage]((tmp_path / name).read_bytes()))
    with pytest.raises(InputError, match=name):
        file = open_tensor_file(tmp_path / name)
        assert file.shapes() and all(file.read(n) is not None for n in state)


def packed(dtype: str, count: int) -> bytes:
    """A safetensors file of a tensor of such a dtype, whose numbers take `count` bytes."""
    header = json.dumps({"a": {"dtype": dtype, "shape": [4, 4], "data_offsets": [0, count]}})
    return struct.pack("<Q", len(header)) + header.encode() + bytes(count)


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


NOT_PLAIN = {
    "sparse": (lambda: torch.eye(4).to_sparse(), "a in .*x.pt is stored as torch.sparse_coo"),
    "sparse rows": (
        lambda: torch.eye(4).to_sparse_csr(),
        "a in .*x.pt is stored as torch.sparse_csr",
    ),
    "on meta": (lambda: torch.eye(4, device="meta"), "a in .*x.pt is on the device 'meta'"),
    "whole": (lambda: torch.eye(4).int(), "a in .*x.pt is of torch.int32; .* not quantized"),
    "complex": (lambda: torch.eye(4).to(torch.complex64), "a in .*x.pt is of torch.complex64"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.eye(4), 0.1, 0, torch.qint8),
        "a in .*x.pt is of torch.qint8",
    ),
    "nested": (nested, "x.pt holds no state dict"),
    "F4": (lambda: packed("F4", 8), "a in .*x.safetensors is of torch.float4_e2m1fn_x2"),
    "F6": (lambda: packed("F6_E2M3", 12), "x.safetensors is not a safetensors file.* F6_E2M3"),
    "E8M0": (lambda: packed("F8_E8M0", 16), "a in .*x.safetensors is of torch.float8_e8m0fnu"),
    "U16": (lambda: packed("U16", 32), "a in .*x.safetensors is of torch.uint16"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about such tensors
@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_what_is_no_plain_tensor_of_numbers_is_named(tmp_path, kind):
    make, told = NOT_PLAIN[kind]
    content = make()
    name = "x.safetensors" if isinstance(content, bytes) else "x.pt"
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save({"a": content}, tmp_path / name)
    with pytest.raises(InputError, match=told):
        file = open_tensor_file(tmp_path / name)
        assert file.shapes() == {"a": (4, 4)}
        file.read("a")


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module"])
def test_a_state_dict_among_other_things(tmp_path, state, key):
    torch.save({"epoch": 3, key: state, "optimizer": {"state": {}}}, tmp_path / "x.pt")
    assert open_tensor_file(tmp_path / "x.pt").shapes().keys() == state.keys()


def test_what_holds_no_state_dict_says_what_it_holds(tmp_path):
    torch.save({"epoch": 3, "loss": 1.5}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="no state dict of tensors: it has epoch, loss"):
        open_tensor_file(tmp_path / "x.pt")
    torch.save([torch.zeros(1)], tmp_path / "x.pt")
    with pytest.raises(InputError, match="it is a list"):
        open_tensor_file(tmp_path / "x.pt")


# ------------------------------------------------------------------------------ which file of many

#            files of a folder, in any order                               the one that is taken
CHOICES = [
    (["open_clip_model.safetensors", "open_clip_pytorch_model.bin"], "open_clip_model.safetensors"),
    (["open_clip_pytorch_model.bin", "a.safetensors"], "open_clip_pytorch_model.bin"),
    (["model.safetensors", "pytorch_model.bin", "model.pth"], "model.safetensors"),
    (["open_clip_pytorch_model.safetensors", "model.safetensors"],
     "open_clip_pytorch_model.safetensors"),
    (["pytorch_model.pth", "model.pth"], "pytorch_model.pth"),
    (["mine.pth", "epoch_7.pt"], "mine.pth"),
    (["epoch_7.pt"], "epoch_7.pt"),
]  # fmt: skip


@pytest.mark.parametrize("files, chosen", CHOICES)
def test_the_file_that_open_clip_takes_is_taken_and_said(tmp_path, state, files, chosen):
    for number, name in enumerate(files):
        write = write_safetensors if name.endswith(".safetensors") else write_torch
        write({**state, "logit_scale": torch.tensor(float(number))}, tmp_path / name)
    source = open_source(tmp_path)
    assert source.read("logit_scale").item() == files.index(chosen)
    if not chosen.endswith(".pt"):
        theirs = open_clip.factory._find_checkpoint_in_dir(tmp_path)
        assert theirs == str(tmp_path / chosen)
    others = [n for n in files if n != chosen and not n.endswith(".pt")]
    assert bool(others) == bool(source.metadata.notes)
    assert all(other in source.metadata.notes[0] for other in others)


@pytest.mark.parametrize("files", [["a.safetensors", "b.bin"], ["epoch_1.pt", "epoch_2.pt"]])
def test_several_files_of_other_names_are_refused(tmp_path, files):
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=f"2 checkpoints .{', '.join(files)}.; name one of them"):
        open_source(tmp_path)


# ----------------------------------------------------------------------------------------- OpenAI's


@pytest.fixture(scope="module")
def openai_state():
    return {
        **{name: torch.tensor(value) for name, value in NUMBERS.items()},
        **{n: t.half() for n, t in reference.random_weights(OPENAI, seed=3).items()},
    }


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("container", CONTAINERS)
def test_openais_checkpoints_are_known_to_be_quick_gelu(tmp_path, openai_state, container, prefix):
    name, write = CONTAINERS[container]
    write({prefix + n: t for n, t in openai_state.items()}, tmp_path / name)
    source = open_source(tmp_path / name)
    architecture = source.metadata.architecture
    theirs = open_clip.model.build_model_from_openai_state_dict(dict(openai_state))
    assert architecture.json == OPENAI and theirs.visual.image_size == (32, 32)
    assert "QuickGELU" in source.metadata.notes[0]
    weights = ModelWeights(source, architecture)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(weights.read(name), tensor.to(weights.read(name).dtype))


def test_openais_resnets_are_refused(tmp_path, openai_state):
    state = {n: t for n, t in openai_state.items() if not n.startswith("visual.")}
    torch.save(state | {"visual.layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "RN50.pt")
    with pytest.raises(InputError, match="OpenAI's ResNets"):
        open_source(tmp_path / "RN50.pt")


def test_an_openai_checkpoint_without_half_of_its_tensors(tmp_path, openai_state):
    state = {n: t for n, t in openai_state.items() if not n.startswith("visual.")}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(InputError, match="tensors that say which model it is of are missing"):
        open_source(tmp_path / "x.pt")


def test_a_torchscript_archive_is_read_without_running_it(tmp_path, state):
    """One whose pickle names what is no part of a model."""
    write_torchscript(state, tmp_path / "good.pt")
    trap = pickle.dumps(Trap(f"touch {tmp_path}/sprung"), protocol=2)
    with zipfile.ZipFile(tmp_path / "good.pt") as good:
        with zipfile.ZipFile(tmp_path / "bad.pt", "w") as bad:
            for name in good.namelist():
                bad.writestr(name, trap if name.endswith("/data.pkl") else good.read(name))
    assert is_torchscript(tmp_path / "bad.pt")
    with pytest.raises(pickle.UnpicklingError, match="system is not part of a model"):
        read_torchscript(tmp_path / "bad.pt")
    with pytest.raises(InputError, match="bad.pt"):
        open_source(tmp_path / "bad.pt")
    assert not (tmp_path / "sprung").exists()


class Trap:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        import os

        return os.system, (self.command,)


def test_a_flipped_bit_in_an_archive_is_found(tmp_path, state):
    write_torchscript(state, tmp_path / "x.pt")
    content = bytearray((tmp_path / "x.pt").read_bytes())
    place = content.find(state["visual.proj"].numpy().tobytes()[:64])
    content[place + 5] ^= 1
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        open_source(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "config",
    [
        {"model_cfg": None},
        {"model_cfg": small_model(), "preprocess_cfg": [1]},
        {"model_cfg": {"embed_dim": 24}},
        [],
        None,
    ],
)
def test_a_config_that_is_none_is_told(tmp_path, state, config):
    save_file(state, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError):
        open_source(tmp_path)


@pytest.mark.parametrize("preprocess", [None, {}, {"mean": None, "std": None, "size": None}])
def test_nulls_in_a_config_are_defaults(tmp_path, state, preprocess):
    save_file(state, tmp_path / "open_clip_model.safetensors")
    config = {"model_cfg": small_model(), "preprocess_cfg": preprocess}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    assert open_source(tmp_path).metadata.architecture.embed_dim == 24
