"""Our towers against OpenCLIP's: features, and the gradient of every parameter, on any layout."""

import functools

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from parallel_clip.errors import InputError
from parallel_clip.layout import Layout, check_model
from parallel_clip.model.architecture import parameter_table
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.model.towers.patch_dropout import kept_patches_of_batch
from tests import reference
from tests.model.clip_cases import Example, dtypes, features_of_file, forward_and_backward
from tests.ranks import whole_tensor
from tests.small_models import KINDS, distance, image_batch, token_batch

RECOMPUTE = ["none", "selective", "full"]
LAYOUTS = [
    Layout(1),
    Layout(2, tensor=2),
    Layout(2, tensor=2, sequence=True),
    Layout(3, tensor=3),
    Layout(3, tensor=3, sequence=True),
    Layout(4, tensor=4, sequence=True),
]
# Kinds on tensor sizes that do not divide them, with `parallel.pad`; the last ranks of some have
# padding alone: of 4 heads on 3 ranks each has room for 2.
PADDED = {
    2: ["three-heads", "timm-siglip-i18n"],
    3: [
        "quick-gelu",
        "layer-scale",
        "truncated-mlp",
        "timm-siglip",
        "timm-siglip2",
        "timm-pe-core",
    ],
    4: ["three-heads", "six-heads", "truncated-mlp", "timm-siglip-i18n"],
}
PAIRS = 5


def runs_on(kind: str, layout: Layout) -> bool:
    is_padded = kind in PADDED.get(layout.tensor, ())
    return is_padded or divides(layout.tensor, kind)


def divides(tensor: int, kind: str) -> bool:
    try:
        check_model(tensor, architecture_from_json(KINDS[kind], kind).costs)
    except InputError:
        return False
    return True


def name_of(layout: Layout) -> str:
    return f"tensor{layout.tensor}" + "-sequence" * layout.sequence


@functools.cache
def example(kind: str) -> Example:
    model_cfg = KINDS[kind]
    vision = architecture_from_json(model_cfg, kind).vision
    kept = None
    if vision.patch_dropout:
        rows = kept_patches_of_batch(3, 1, range(PAIRS), vision.patches, vision.patches_kept)
        kept = torch.from_numpy(rows)
    generator = torch.Generator().manual_seed(4)
    return Example(
        model_cfg,
        reference.random_weights(model_cfg, seed=2),
        image_batch(model_cfg, PAIRS),
        token_batch(model_cfg, PAIRS),
        torch.randn(2, PAIRS, model_cfg["embed_dim"], generator=generator),
        kept,
    )


@functools.cache
def expected(kind: str):
    """OpenCLIP's features and gradients, and its features in evaluation mode."""
    given = example(kind)
    model = reference.build_model(given.model_cfg)
    model.load_state_dict(given.weights)
    with torch.no_grad():
        model.eval()
        evaluated = torch.stack(model(given.images, given.tokens)[:2])
    model.train()
    if given.kept is not None:
        reference.feed_patch_dropout(model).kept = given.kept
    features = torch.stack(model(given.images, given.tokens)[:2])
    features.backward(given.feature_grad)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return features.detach(), evaluated, gradients


@pytest.fixture(scope="module")
def outcomes(processes):
    """What the ranks of a layout make of every kind that fits it, in each recompute mode."""

    @functools.cache
    def on(layout: Layout):
        examples = {kind: example(kind) for kind in KINDS if runs_on(kind, layout)}
        return processes.run(layout, forward_and_backward, examples=examples, recompute=RECOMPUTE)

    return on


def test_every_kind_runs_on_several_layouts():
    for kind in KINDS:
        assert sum(runs_on(kind, layout) for layout in LAYOUTS) >= 3


def test_what_is_padded_would_not_divide():
    for tensor, kinds in PADDED.items():
        assert not any(divides(tensor, kind) for kind in kinds)


@pytest.mark.parametrize(
    "layout, kind",
    [
        pytest.param(layout, kind, id=f"{name_of(layout)}-{kind}")
        for layout in LAYOUTS
        for kind in KINDS
        if runs_on(kind, layout)
    ],
)
def test_features_and_gradients_are_openclips(outcomes, layout, kind):
    features, evaluated, gradients = expected(kind)
    table = {p.name: p for p in parameter_table(architecture_from_json(KINDS[kind], kind))}
    for recompute in RECOMPUTE:
        ranks = [of_rank[kind, recompute] for of_rank in outcomes(layout)]
        for rank in ranks:
            assert distance(rank.features, features) < 1e-5
            assert distance(rank.evaluated, evaluated) < 1e-5
        assert ranks[0].gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            ours = whole_tensor(table[name], [rank.gradients[name] for rank in ranks])
            assert distance(ours, gradient) < 1e-5, (recompute, name)


@pytest.mark.parametrize("layout", [Layout(1), Layout(2, tensor=2, sequence=True)], ids=name_of)
def test_a_whole_vit_b_32(processes, vit_b_32, layout):
    file, images, tokens, features = vit_b_32
    for ours in processes.run(
        layout,
        features_of_file,
        model_name="ViT-B-32",
        weights=file,
        images=images,
        tokens=tokens,
    ):
        assert distance(ours[0], features[0]) < 1e-5
        assert distance(ours[1], features[1]) < 1e-5


@pytest.fixture(scope="module")
def vit_b_32(tmp_path_factory):
    """OpenCLIP's random ViT-B-32 as a file, with inputs and its features of them."""
    file = tmp_path_factory.mktemp("vit") / "open_clip_model.safetensors"
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32").eval()
    save_file(model.state_dict(), file)
    images, tokens = torch.randn(2, 3, 224, 224), torch.randint(1, 49407, (2, 77))
    with torch.no_grad():
        features = torch.stack(model(images, tokens)[:2])
    return file, images, tokens, features


def test_in_bf16_the_logit_parameters_stay_fp32(processes):
    (held,) = processes.run(Layout(1), dtypes, model_cfg=KINDS["siglip"])
    fp32 = {name for name, dtype in held.items() if dtype == torch.float32}
    assert fp32 == {"logit_scale", "logit_bias"}
    assert {held[name] for name in held.keys() - fp32} == {torch.bfloat16}
