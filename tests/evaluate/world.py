"""A small held-out set, an encoder that is plain arithmetic, and several processes to use them."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from parallel_clip.data.feeding.evaluation_data import EvaluationBatch, EvaluationData
from parallel_clip.data.index.shard_table import find_checked_shards
from parallel_clip.data.samples.transforms import Preprocess

WIDTH, CONTEXT = 8, 40


class LetterTokenizer:
    """A token is a letter."""

    context_length, vocab_size, folder = CONTEXT, 256, None

    def __call__(self, texts: Sequence[str]) -> Tensor:
        rows = [list(text.encode()[:CONTEXT].ljust(CONTEXT, b"\0")) for text in texts]
        return torch.tensor(rows, dtype=torch.int64).view(-1, CONTEXT)


class ArithmeticEncoder:
    """Each feature depends on its own picture or text alone, to the last bit."""

    class architecture:  # noqa: N801  (stands for an attribute)
        embed_dim = WIDTH

    preprocess = Preprocess(image_size=(4, 4))
    tokenizer = LetterTokenizer()
    device = torch.device("cpu")

    def __init__(self):
        draw = torch.Generator().manual_seed(0)
        self._picture = torch.randn(3 * 4 * 4, WIDTH, generator=draw)
        self._text = torch.randn(CONTEXT, WIDTH, generator=draw)
        self.texts_encoded = 0

    def encode_image(self, images: Tensor) -> Tensor:
        return self._features(images.flatten(1), self._picture)

    def encode_text(self, tokens: Tensor) -> Tensor:
        self.texts_encoded += len(tokens)
        return self._features(tokens / 100, self._text)

    def broadcast_from_last_stage(self, values: Tensor) -> Tensor:
        return values

    @staticmethod
    def _features(inputs: Tensor, weights: Tensor) -> Tensor:
        rows = [(row[:, None] * weights).sum(dim=0) for row in inputs]
        return F.normalize(torch.stack(rows), dim=-1)


def some_samples(count: int) -> dict[str, dict[str, bytes]]:
    """Pictures with one to three captions and a label of 0 to 6 each."""
    samples = {}
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 255, (4, 4, 3), np.uint8)
        picture = io.BytesIO()
        Image.fromarray(pixels).save(picture, "PNG")
        captions = "\n".join(f"caption {i} of picture {number}" for i in range(number % 3 + 1))
        label = str(number % 7)
        files = {"png": picture.getvalue(), "txt": captions.encode(), "cls": label.encode()}
        samples[f"{number:04d}"] = files
    return samples


def batches_of(
    shard: Path, need: str, group: dist.ProcessGroup | None = None
) -> Sequence[EvaluationBatch]:
    """This rank's part of the samples, five at a time."""
    rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
    encoder = ArithmeticEncoder()
    data = EvaluationData(
        find_checked_shards(str(shard), lambda text: None),
        encoder.preprocess,
        encoder.tokenizer,
        rank=rank,
        ranks=ranks,
        batch=5,
        need=need,
    )
    return list(data)


def on_ranks(ranks: int, function: Callable, folder: Path, *arguments) -> list:
    """What `function(group, *arguments)` returns, or the error it raises, on each of `ranks`."""
    # Forked, so that no process has to import torch again; they use no CUDA and one thread.
    torch.multiprocessing.start_processes(
        _on_rank, (ranks, function, folder, arguments), nprocs=ranks, start_method="fork"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _on_rank(rank: int, ranks: int, function: Callable, folder: Path, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks
    )
    try:
        result = function(dist.group.WORLD, *arguments)
    except Exception as error:
        result = error
    torch.save(result, folder / f"{rank}.pt")
    dist.destroy_process_group()
