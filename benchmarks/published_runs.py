"""Throughput of CLIP training that others have published, and how their runs were laid out.

All are data-parallel with one microbatch a step. What a source does not say is assumed: `recompute`
full for OpenCLIP's ViT-L and larger (its --grad-checkpointing).
"""

from __future__ import annotations

from dataclasses import dataclass

SCALING_LAWS = (
    "Cherti et al., arXiv 2212.07143: trained_models_info.csv of github.com/LAION-AI/"
    "scaling-laws-openclip, of several runs of a kind the quickest"
)
NEMO = (
    "NVIDIA, NeMo framework user guide, CLIP performance (2308): docs.nvidia.com/nemo-framework/"
    "user-guide/latest/multimodalmodels/visionlanguagefoundation/clip/perf.html; microbatch assumed"
)


@dataclass(frozen=True)
class PublishedRun:
    """pairs: of a step on each GPU; samples_per_second: of the whole run."""

    source: str
    gpu: str
    model: str
    gpus: int
    pairs: int
    samples_per_second: float
    nodes_of: int = 8
    recompute: str = "none"
    fitted: bool = False  # the run that `overhead` in the device files is from


RUNS = [
    PublishedRun(NEMO, "a100", "ViT-g-14", 8, 80, 559, fitted=True),
    PublishedRun(NEMO, "a100", "ViT-g-14", 128, 80, 8633),
    PublishedRun(NEMO, "h100", "ViT-g-14", 8, 80, 935),
    PublishedRun(NEMO, "h100", "ViT-g-14", 128, 80, 13829),
    PublishedRun(SCALING_LAWS, "a100", "ViT-B-32", 128, 256, 108844.6, 4),
    PublishedRun(SCALING_LAWS, "a100", "ViT-B-32", 344, 256, 219759.0, 4),
    PublishedRun(SCALING_LAWS, "a100", "ViT-B-16", 176, 512, 64314.4, 4),
    PublishedRun(SCALING_LAWS, "a100", "ViT-B-16", 344, 256, 136370.9, 4),
    PublishedRun(SCALING_LAWS, "a100", "ViT-L-14", 200, 448, 35524.8, 4, "full"),
    PublishedRun(SCALING_LAWS, "a100", "ViT-L-14", 400, 224, 41970.1, 4, "full"),
    PublishedRun(SCALING_LAWS, "a100", "ViT-L-14", 1024, 84, 79116.3, 4, "full"),
    PublishedRun(SCALING_LAWS, "a100", "ViT-H-14", 824, 96, 34608.0, 8, "full"),
    PublishedRun(SCALING_LAWS, "a100", "ViT-g-14", 800, 80, 24800.0, 8, "full"),
]
