"""An image tower of another family trains on any layout, and no file of the package knows of it.

To add one touches two files: its own (here attention_pool_tower.py) and the one that makes an
Architecture of it (here `toy_architecture`; in the package the reader of OpenCLIP's JSON).
"""

import dataclasses
import functools

import open_clip.loss
import pytest
import torch
from torch import Tensor, nn

from parallel_clip.layout import Layout
from parallel_clip.model.architecture import Architecture, parameter_table
from parallel_clip.model.initialize import initial_value
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.plan.layout_plan import make_layout_plan
from parallel_clip.plan.memory import dry_run
from parallel_clip.stages.partition import partition
from tests import reference
from tests.model.another_tower_cases import train
from tests.model.attention_pool_tower import AttentionPool, AttentionPoolConfig
from tests.ranks import config_of, whole_tensors
from tests.small_models import distance, small_model, token_batch

WIDTH, LAYERS, HEADS, EPS, PAIRS = 32, 2, 4, 1e-6, 8
IMAGE, PATCH = (24, 40), (8, 8)  # 15 tokens: odd


def toy_architecture() -> Architecture:
    vision = AttentionPoolConfig(
        width=WIDTH,
        layers=LAYERS,
        heads=HEADS,
        mlp_width=3 * WIDTH,
        layer_scale=None,
        activation="gelu",
        image_size=IMAGE,
        patch_size=PATCH,
    )
    return dataclasses.replace(architecture_from_json(small_model(), "toy"), vision=vision)


class Block(nn.Module):
    """A plain pre-norm transformer block, [b, s, h] -> [b, s, h]."""

    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH, eps=EPS), nn.LayerNorm(WIDTH, eps=EPS)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(WIDTH, 3 * WIDTH), "c_proj": nn.Linear(3 * WIDTH, WIDTH)}
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp.c_proj(nn.functional.gelu(self.mlp.c_fc(self.ln_2(x))))


class PlainTower(nn.Module):
    """The toy in one process, with the same names."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH, bias=False)
        self.positional_embedding = nn.Parameter(torch.empty(15, WIDTH))
        self.transformer = nn.ModuleDict(
            {"resblocks": nn.Sequential(*[Block() for _ in range(LAYERS)])}
        )
        self.ln_post = nn.LayerNorm(WIDTH, eps=EPS)
        self.pool = AttentionPool(WIDTH, embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        x_bsh = self.conv1(images).flatten(2).transpose(1, 2) + self.positional_embedding
        x_bsh = self.ln_post(self.transformer.resblocks(x_bsh))
        return self.pool(x_bsh.transpose(0, 1))


def plain_model() -> nn.Module:
    """OpenCLIP's model with the toy in the place of its image tower."""
    model = reference.build_model(small_model())
    model.visual = PlainTower(small_model()["embed_dim"])
    return model


@functools.cache
def inputs() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Weights off their initial values, so that no bias is zero; pictures; tokens."""
    generator = torch.Generator().manual_seed(3)
    weights = {
        p.name: initial_value(p, seed=1) + 0.05 * torch.randn(p.shape, generator=generator)
        for p in parameter_table(toy_architecture())
    }
    images = torch.randn(PAIRS, 3, *IMAGE, generator=generator)
    return weights, images, token_batch(small_model(), PAIRS)


@functools.cache
def answers_of_one_process(processes):
    return run(processes, Layout(1), 2)[0]


def run(processes, layout: Layout, microbatches: int) -> list:
    weights, images, tokens = inputs()
    return processes.run(
        layout,
        train,
        architecture=toy_architecture(),
        weights=weights,
        images=images,
        tokens=tokens,
        microbatches=microbatches,
    )


def test_its_names_and_shapes_are_what_checkpoints_go_by():
    ours = {p.name: p.shape for p in parameter_table(toy_architecture())}
    assert ours == {name: tuple(x.shape) for name, x in plain_model().state_dict().items()}


def test_loss_and_every_gradient_are_the_plain_models(processes):
    weights, images, tokens = inputs()
    model = plain_model()
    model.load_state_dict(weights)
    loss = open_clip.loss.ClipLoss()(*model(images, tokens))
    loss.backward()
    records, gradients = answers_of_one_process(processes)
    assert records[0][0] == pytest.approx(loss.item(), rel=1e-5)
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert distance(gradients[name], gradient) < 1e-5, name


@pytest.mark.parametrize(
    "layout",
    [
        Layout(2, tensor=2, sequence=True),
        Layout(2, pipeline=2),
        Layout(2, pipeline=2, virtual_pipeline=2),
    ],
    ids=["tensor2-sequence", "pipeline2", "pipeline2-virtual2"],
)
def test_it_trains_the_same_on_other_layouts(processes, layout):
    records, gradients = answers_of_one_process(processes)
    answers = run(processes, layout, 2)
    for found, _ in answers:
        for ours, alone in zip(found, records, strict=True):
            assert ours == pytest.approx(alone, rel=1e-4)
    assert records[-1][0] < records[0][0]
    ours = whole_tensors(parameter_table(toy_architecture()), [held for _, held in answers])
    for name, gradient in gradients.items():
        assert distance(ours[name], gradient) < 1e-5, name


def test_its_memory_is_counted():
    architecture = toy_architecture()
    (whole,) = partition(architecture.costs, 1)
    assert whole.vision.layers == LAYERS
    config = config_of(Layout(1), batch={"global": PAIRS, "micro": PAIRS})
    plan = make_layout_plan(architecture.costs, 1, config)
    counted = dry_run(config, architecture, plan)
    assert counted.parameters == sum(x.numel() for x in plain_model().parameters())
    assert counted.saved > 0
