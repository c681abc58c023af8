"""FLOPs of the parts of a model against torch's own count over OpenCLIP's model."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from parallel_clip.config import Freeze, PartlyFrozen
from parallel_clip.engine.fake_world import fake_rank
from parallel_clip.layout import Layout
from parallel_clip.model.known_models import load_architecture
from parallel_clip.model.megatron_config import ModelOptions
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.plan.build import frozen_parts
from parallel_clip.stages.costs import ModelCosts, backward_cost, block_units, stage_cost
from parallel_clip.stages.padding import padding_words
from parallel_clip.stages.partition import partition
from parallel_clip.stages.stage import LayerRange, Stage, whole_model
from tests import reference
from tests.ranks import unsplit_model
from tests.small_models import KINDS, image_batch, small_model, token_batch

PAIRS = 2
KINDS_COUNTED = ["plain", "truncated-mlp", "clipa", "oblong", "patch-dropout", "six-heads"]
TIMM_KINDS = [
    "timm-siglip",
    "timm-siglip-i18n",
    "timm-linear",
    "timm-pe-core",
    "timm-mobile-clip",
    "timm-clip-map",
]


def counted(model_cfg: dict, backward: bool = False, freeze: dict | None = None):
    """FLOPs of OpenCLIP's model in training. Attention is taken in its plain form, two products a
    pass: the backward of a fused kernel computes the scores again, and torch counts that too."""
    model = reference.build_model(model_cfg).train()
    reference.lock_towers(model, freeze or {})
    images, tokens = image_batch(model_cfg, PAIRS), token_batch(model_cfg, PAIRS)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        image_features, text_features, *_ = model(images, tokens)
        if backward:
            (image_features.sum() + text_features.sum()).backward()
    return counter


def by_module(counter: FlopCounterMode) -> dict[str, int]:
    return {
        name: sum(operations.values()) for name, operations in counter.get_flop_counts().items()
    }


def whole_cost(costs: ModelCosts) -> int:
    return stage_cost(whole_model(costs.vision.layers, costs.text.layers), costs)


@pytest.mark.parametrize("kind", [*KINDS_COUNTED, *TIMM_KINDS])
def test_the_whole_model_costs_what_torch_counts(kind):
    architecture = architecture_from_json(KINDS[kind], kind)
    total = counted(KINDS[kind]).get_total_flops()
    width, pool = architecture.vision.width, getattr(architecture.vision, "pool", "tok")
    # The pool's query is projected once for every picture there, and once for all here.
    query = PAIRS * 2 * width**2 if pool not in ("tok", "avg", None) else 0
    assert PAIRS * whole_cost(architecture.costs) == total - query


@pytest.mark.parametrize("kind", KINDS_COUNTED)
def test_each_part_costs_what_torch_counts(kind):
    architecture = architecture_from_json(KINDS[kind], kind)
    vision, text = architecture.costs.vision, architecture.costs.text
    counts = by_module(counted(KINDS[kind]))
    assert PAIRS * vision.embedding == counts["CLIP.visual.conv1"]
    assert PAIRS * vision.block == counts["CLIP.visual.transformer.resblocks.1"]
    assert PAIRS * text.block == counts["CLIP.transformer.resblocks.1"]


def test_the_backward_costs_twice_the_forward():
    """But for the patch convolution, whose pictures need no gradient: it costs once."""
    model_cfg = small_model()
    architecture = architecture_from_json(model_cfg, "small")
    forward = whole_cost(architecture.costs)
    spared = architecture.costs.vision.embedding
    total = counted(model_cfg, backward=True).get_total_flops()
    assert total == PAIRS * (3 * forward - spared)


@pytest.mark.parametrize(
    "freeze",
    [
        {"vision": "all"},
        {"vision": {"unlocked_groups": 2}, "text": {"unlocked_groups": 1}},
        {"vision": {"unlocked_groups": 0, "norms": True}, "text": {"unlocked_groups": 3}},
    ],
)
def test_what_is_frozen_spares_its_part_of_the_backward(freeze):
    """Where matrices alone are frozen, but for the scores of attention, both of whose factors have
    a gradient: here up to a tenth of a block."""
    model_cfg = small_model({"layers": 3})
    architecture = architecture_from_json(model_cfg, "small")
    sections = {k: how if how == "all" else PartlyFrozen(**how) for k, how in freeze.items()}
    costs = frozen_parts(architecture, Freeze(**sections)).costs_of(architecture)
    stage = whole_model(3, 2)
    total = counted(model_cfg, backward=True, freeze=freeze).get_total_flops()
    spared = 0 if "vision" in freeze else costs.vision.embedding
    ours = PAIRS * (whole_cost(costs) + backward_cost(stage, costs) - spared)
    assert ours == pytest.approx(total, rel=0.05 if "norms" in str(freeze) else 0.005)


def test_a_block_whose_mlp_is_four_times_as_wide_as_it_costs_24sh2_and_4s2h():
    """Narayanan et al., arXiv 2104.04473, appendix: 24Bsh² + 4Bs²h for the forward pass."""
    assert block_flops(tokens=50, width=768, mlp_width=3072) == 24 * 50 * 768**2 + 4 * 50**2 * 768


def block_flops(tokens: int, width: int, mlp_width: int, heads: int = 4) -> int:
    return sum(units.count * units.flops for units in block_units(tokens, width, heads, mlp_width))


@pytest.mark.parametrize(
    ("name", "picture", "text"),
    [
        ("ViT-B-32", 8.82, 5.96),
        ("ViT-B-16", 35.13, 5.96),
        ("ViT-L-14", 162.03, 13.30),
        ("ViT-H-14", 334.59, 47.09),
        ("ViT-bigG-14", 967.50, 97.86),
    ],
)
def test_towers_against_open_clips_table(name, picture, text):
    """10⁹ FLOPs of a picture and of a text in docs/model_profile.csv of mlfoundations/open_clip."""
    costs = load_architecture(name).costs
    whole = whole_model(costs.vision.layers, costs.text.layers)
    ours = costs.vision.of(whole.vision), costs.text.of(whole.text)
    assert [flops / 1e9 for flops in ours] == pytest.approx([picture, text], abs=0.0051)


def test_patch_dropout_spares_the_blocks_and_not_the_patch_embedding():
    plain, dropping = (
        architecture_from_json(small_model({"patch_dropout": rate}), "small").costs.vision
        for rate in (0.0, 0.5)
    )
    assert dropping.embedding == plain.embedding
    assert dropping.block == block_flops(tokens=1 + 8, width=48, mlp_width=192)


def test_a_stage_costs_its_layers_and_the_ends_that_it_holds():
    architecture = load_architecture("ViT-B-32")
    vision, text = architecture.costs.vision, architecture.costs.text

    def cost(vision_range: tuple[int, int], text_range: tuple[int, int]) -> int:
        stage = Stage(1, 3, LayerRange(*vision_range, 12), LayerRange(*text_range, 12))
        return stage_cost(stage, architecture.costs)

    assert cost((3, 5), (4, 4)) == 2 * vision.block
    assert cost((0, 1), (0, 0)) == vision.embedding + vision.block
    assert cost((12, 12), (0, 12)) == 12 * text.block + text.head
    assert cost((9, 12), (11, 12)) == 3 * vision.block + vision.head + text.block + text.head


@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-SO400M-14-SigLIP-384"])
@pytest.mark.parametrize("tensor", [1, 2, 3, 8, 24])
def test_padding_costs_what_a_model_of_so_many_heads_and_channels_would(name, tensor):
    """Towers whose sizes were multiples from the start, of the same width."""
    costs = load_architecture(name).costs
    padded = costs.padded(tensor)
    for tower, with_padding in ((costs.vision, padded.vision), (costs.text, padded.text)):
        heads, channels = tower.block_units
        more_heads, more_channels = (-units.count % tensor for units in tower.block_units)
        added = more_heads * heads.flops + more_channels * channels.flops
        assert with_padding.block == tower.block + added
        of_pool = sum(-units.count % tensor * units.flops for units in tower.head_units)
        assert with_padding.head == tower.head + of_pool
        assert with_padding.embedding == tower.embedding
        assert (with_padding == tower) == (not any(u.count % tensor for u in tower.split_units))


@pytest.mark.parametrize("kind", ["plain", "timm-linear", "timm-clip-map"])
@pytest.mark.parametrize("tensor", [1, 2, 3])
def test_tensor_ranks_together_compute_what_torch_counts_on_one_of_them(kind, tensor):
    """Padding, and embeddings and projections, which every rank computes whole, included."""
    architecture = architecture_from_json(KINDS[kind], kind)
    vision = architecture.vision
    images, tokens = image_batch(KINDS[kind], PAIRS), token_batch(KINDS[kind], PAIRS)
    kept = torch.arange(vision.patches_kept).expand(PAIRS, -1) if vision.patch_dropout else None
    with fake_rank(Layout(tensor, tensor=tensor)) as groups:
        model = unsplit_model(architecture, ModelOptions(), groups.tensor)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(images, tokens, kept)
    costs = architecture.costs.on_tensor_ranks(tensor)
    of_pool = [units for units in costs.vision.head_units if units.name == "heads of the pool"]
    # The pool's query, of one token whatever the number of pictures, is not counted here.
    query = sum(2 * vision.width * units.count * vision.pool.head_width for units in of_pool)
    assert tensor * counter.get_total_flops() == PAIRS * whole_cost(costs) + query
    assert tensor > 1 or costs == architecture.costs


def test_a_picture_with_several_texts_costs_what_torch_counts():
    architecture = architecture_from_json(KINDS["plain"], "small")
    images, tokens = image_batch(KINDS["plain"], PAIRS), token_batch(KINDS["plain"], 3 * PAIRS)
    with fake_rank(Layout(1)) as groups:
        model = unsplit_model(architecture, ModelOptions(captions=3), groups.tensor)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(images, tokens)
    assert counter.get_total_flops() == PAIRS * whole_cost(architecture.costs.with_captions(3))


def test_padding_in_words():
    """Of the 12 blocks of ViT-B-16's image tower 4 of 16 heads are padding; s = 197, h = 768."""
    costs = load_architecture("ViT-B-16").costs
    added = 12 * 4 * (8 * 197 * 768 * 64 + 4 * 197**2 * 64)
    percent = 100 * added / (whole_cost(costs) + added)
    assert padding_words(costs, 4) is None
    assert padding_words(costs, 8) == (
        f"vision 12 heads to 16: {percent:.1f}% of all FLOPs are on zeros"
    )
    words = padding_words(load_architecture("ViT-SO400M-14-SigLIP-384").costs, 3)
    assert "16 heads of the pool to 18, 4304 MLP channels of the pool to 4305; text 16" in words


@pytest.mark.parametrize("count", [1, 2, 5, 24])
def test_the_stages_together_cost_what_the_whole_costs(count):
    costs = load_architecture("ViT-B-32").costs
    assert sum(stage_cost(stage, costs) for stage in partition(costs, count)) == whole_cost(costs)
