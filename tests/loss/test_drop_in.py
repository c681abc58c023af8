"""The losses in someone's OpenCLIP script: arguments, errors, and a training of its own model."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from parallel_clip.layout import Layout
from parallel_clip.loss import ClipLoss, SigLipLoss
from tests.loss import drop_in_cases
from tests.reference import random_weights
from tests.small_models import distance, image_batch, small_model, token_batch

LOSSES = (ClipLoss, SigLipLoss)
every_loss = pytest.mark.parametrize("loss", LOSSES)


def features(count: int = 6, width: int = 8, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    both = F.normalize(torch.randn(2, count, width, generator=generator), dim=-1)
    return [x.to(dtype).clone().requires_grad_() for x in both]


def call(loss, arguments) -> list[torch.Tensor]:
    """The loss and the gradients of pictures and texts."""
    value = loss(*arguments)
    return [value.detach(), *torch.autograd.grad(value, arguments[:2])]


def one_vector(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.flatten() for x in weights.values()])


def same(first, second) -> bool:
    return all(map(torch.equal, first, second))


def test_open_clips_model_trains_alike(processes):
    model_cfg = small_model()
    arguments = {
        "model_cfg": model_cfg,
        "weights": random_weights(model_cfg, seed=0),
        "images": image_batch(model_cfg, 10),
        "tokens": token_batch(model_cfg, 10),
        "steps": 5,
    }
    train = drop_in_cases.train_open_clip
    theirs = processes.run(Layout(2), train, ours=None, **arguments)
    ours = processes.run(Layout(2), train, ours=ClipLoss, **arguments)
    assert ours[0][0] == ours[1][0], "every rank has the loss of the whole batch"
    whole = [sum(step) / 2 for step in zip(*(losses for losses, _ in theirs), strict=True)]
    assert ours[0][0] == pytest.approx(whole, rel=1e-5)
    assert whole[-1] < 0.9 * whole[0], "five steps that do something"
    for (_, found), (_, expected) in zip(ours, theirs, strict=True):
        assert distance(one_vector(found), one_vector(expected)) < 1e-5
        for name, tensor in expected.items():
            value = found[name]
            if name.endswith("in_proj_bias"):  # its key third has no gradient but rounding
                value, tensor = (torch.cat(x.chunk(3)[::2]) for x in (value, tensor))
            assert distance(value, tensor) < 1e-4, name


@every_loss
@pytest.mark.parametrize(
    "arguments",
    [
        {"local_loss": True},
        {"gather_with_grad": True},
        {"local_loss": True, "gather_with_grad": True, "cache_labels": True},
        {"rank": 0, "world_size": 1, "use_horovod": False},
        *({"dist_impl": name} for name in ("gather", "reduce", "bidir", "shift")),
    ],
    ids=str,
)
def test_open_clips_arguments_are_taken_and_change_no_number(loss, arguments):
    # One way to compute may round otherwise than another.
    plain = call(loss(), [*features(), 10.0])
    for ours, theirs in zip(call(loss(**arguments), [*features(), 10.0]), plain, strict=True):
        assert distance(ours, theirs) < 1e-6


def test_open_clips_arguments_by_place():
    loss = ClipLoss(True, True, True, 0, 1, False)
    assert same(call(loss, [*features(), 10.0]), call(ClipLoss(), [*features(), 10.0]))


@every_loss
@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"use_horovod": True}, "use_horovod: only torch.distributed is supported"),
        ({"dist_impl": "tree"}, "dist_impl 'tree': expected one of gather, reduce, bidir, shift"),
        ({"exchange": "pigeon"}, "exchange 'pigeon': expected auto, gather or ring"),
        ({"tile": 0}, "tile 0: expected auto or a number of columns of at least 1"),
    ],
    ids=str,
)
def test_wrong_settings(loss, arguments, words):
    with pytest.raises(ValueError, match=words):
        loss(**arguments)


@every_loss
@pytest.mark.parametrize(
    "identities", [torch.arange(5), torch.arange(6.0), torch.arange(6)[:, None]], ids=str
)
def test_wrong_identities(loss, identities):
    with pytest.raises(ValueError, match="expected one of torch.int64 for each of the 6 texts"):
        loss()(*features(), 10.0, identities=identities)


@every_loss
def test_identities_alone_and_without_a_process_group(loss):
    """A caption that three pairs share: what takes part is what a batch without them has."""
    images, texts = features()
    identities = torch.tensor([5, 1, 5, 2, 3, 5])
    masked = loss()(images, texts, 10.0, identities=identities)
    assert masked < loss()(images, texts, 10.0)
    in_tiles = loss(tile=2)(images, texts, 10.0, identities=identities + 7)
    assert torch.allclose(masked, in_tiles, rtol=1e-6)
    distinct = call(lambda *given: loss()(*given, identities=torch.arange(6)), [*features(), 10.0])
    assert same(distinct, call(loss(), [*features(), 10.0]))


@pytest.mark.parametrize("amount", [-0.1, 1, 1.0, float("nan")])
def test_wrong_smoothing(amount):
    with pytest.raises(ValueError, match="label_smoothing .*: expected 0 or more, below 1"):
        ClipLoss(label_smoothing=amount)


@every_loss
@pytest.mark.parametrize(
    "images, texts, words",
    [
        ((4, 8), (5, 8), r"\[4, 8\] and text_features \[5, 8\]: expected \[pairs, width\] twice"),
        ((4, 8), (4, 9), r"\[4, 8\] and text_features \[4, 9\]"),
        ((4, 8, 2), (4, 8, 2), r"expected \[pairs, width\] twice"),
        ((8,), (8,), r"expected \[pairs, width\] twice"),
        ((0, 8), (0, 8), "there are no pairs"),
    ],
)
def test_wrong_shapes(loss, images, texts, words):
    with pytest.raises(ValueError, match=words):
        loss()(torch.ones(images), torch.ones(texts), 10.0)


@every_loss
@pytest.mark.parametrize("arguments", [{"rank": 1}, {"world_size": 2}], ids=str)
def test_a_place_that_is_not_this_one(loss, arguments):
    with pytest.raises(ValueError, match=r"(rank 1|world_size 2), but the process group says"):
        loss(**arguments)(*features(), 10.0)


@every_loss
def test_a_place_among_ranks(processes, loss):
    at = drop_in_cases.at_a_place
    assert processes.run(Layout(2), at, loss=loss, off=0, world_size=2) == ["", ""]
    found = processes.run(Layout(2), at, loss=loss, off=1, world_size=2)
    assert found == [f"rank {r + 1}, but the process group says {r}" for r in range(2)]
    found = processes.run(Layout(2), at, loss=loss, off=0, world_size=4)
    assert found == ["world_size 4, but the process group says 2"] * 2


@every_loss
@pytest.mark.parametrize(
    "shapes",
    [[(4, 8), (4, 8), (3, 8)], [(0, 8), (2, 8), (2, 8)], [(4, 8), (4, 6), (4, 8)]],
    ids=str,
)
def test_ranks_with_other_shapes_are_named_and_none_waits(processes, loss, shapes):
    shown = ", ".join(f"rank {rank}: {b} x {width}" for rank, (b, width) in enumerate(shapes))
    found = processes.run(
        Layout(3), drop_in_cases.with_such_shapes, loss=loss, shapes=shapes, seconds=60
    )
    said = f"every rank must hold the same number of pairs, of the same width; {shown}"
    assert found == [[said] * 2] * 3


@every_loss
def test_a_rank_without_identities_is_named_and_none_waits(processes, loss):
    found = processes.run(Layout(3), drop_in_cases.identities_on_rank_one, loss=loss, seconds=60)
    said = (
        "every rank must hold the same number of pairs, of the same width, all with identities or "
        "all without; rank 0: 4 x 8 without identities, rank 1: 4 x 8 with identities, "
        "rank 2: 4 x 8 without identities"
    )
    assert found == [said] * 3


@every_loss
def test_no_rank_has_pairs(processes, loss):
    found = processes.run(
        Layout(2), drop_in_cases.with_such_shapes, loss=loss, shapes=[(0, 8)] * 2, seconds=60
    )
    assert found == [["there are no pairs: image_features is empty"] * 2] * 2


@every_loss
def test_a_group_that_does_not_hold_this_rank(processes, loss):
    found = processes.run(Layout(2), drop_in_cases.in_a_group_of_rank_zero, loss=loss)
    assert found == ["", "group: rank 1 is not one of its ranks"]


@every_loss
def test_features_of_another_length_are_said_once(loss):
    images, texts = features()
    module = loss()
    with pytest.warns(UserWarning, match="text_features are not of length 1") as said:
        module(images, 1.5 * texts, 10.0)
    assert [x.filename for x in said] == [__file__]
    with warnings.catch_warnings(action="error"):
        module(images, 1.5 * texts, 10.0)
        loss()(images, texts, 10.0)
        loss()(*features(dtype=torch.bfloat16), 10.0)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(loss, dtype):
    plain = call(loss(), [*features(dtype=dtype), 10.0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = call(loss(), [*features(dtype=dtype), 10.0])
    assert same(plain, within)


@every_loss
def test_without_gradients(loss):
    with torch.no_grad():
        value = loss()(*features(), torch.tensor(10.0, requires_grad=True))
    assert not value.requires_grad
    assert torch.equal(value, loss()(*features(), 10.0).detach())


@every_loss
def test_whatever_is_frozen_has_no_gradient(loss):
    images, texts = features()
    loss()(images.detach(), texts, 10.0).backward()
    alone = texts.grad.clone()
    texts.grad = None
    loss()(images, texts, 10.0).backward()
    assert torch.equal(texts.grad, alone)


@every_loss
@pytest.mark.parametrize(
    "scale, bias",
    [
        (10.0, -2.0),
        (torch.tensor(10.0), torch.tensor(-2.0)),
        (torch.tensor([10.0]), torch.tensor([-2.0])),
        (torch.tensor(10.0, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.bfloat16)),
    ],
    ids=str,
)
def test_kinds_of_scale_and_bias(loss, scale, bias):
    expected = call(loss(), [*features(), 10.0, -2.0])
    assert same(call(loss(), [*features(), scale, bias]), expected)
    if isinstance(scale, float):
        return
    scale, bias = (x.clone().requires_grad_() for x in (scale, bias))
    loss()(*features(), scale, bias).backward()
    assert (scale.grad.shape, scale.grad.dtype) == (scale.shape, scale.dtype)
    assert (bias.grad.shape, bias.grad.dtype) == (bias.shape, bias.dtype)
    plain = torch.tensor(10.0, requires_grad=True)
    loss()(*features(), plain, bias.detach()).backward()
    assert scale.grad.item() == plain.grad.item()


@every_loss
def test_layout_in_memory_does_not_matter(loss):
    images, texts = features()
    wide = torch.stack([images, texts], dim=-1).detach()  # the features of each lie apart
    apart = [wide[..., i].requires_grad_() for i in range(2)]
    assert not apart[0].is_contiguous()
    assert same(call(loss(), [*apart, 10.0]), call(loss(), [images, texts, 10.0]))


@every_loss
def test_the_gradient_follows_a_weight_of_the_loss(loss):
    images, texts = features()
    plain = call(loss(), [images, texts, 10.0])[1:]
    weighted = torch.autograd.grad(0.25 * loss()(images, texts, 10.0), [images, texts])
    assert same(weighted, [0.25 * x for x in plain])


@every_loss
def test_a_second_derivative_is_refused_and_not_wrong(loss):
    images, texts = features()
    squared = loss()(images, texts, 10.0) ** 2
    (grad,) = torch.autograd.grad(squared, images, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
