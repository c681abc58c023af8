import numpy as np
import pytest
import torch

from parallel_clip.evaluate import ranking
from parallel_clip.evaluate.retrieval import retrieval_recalls


def features(count: int, width: int = 16, seed: int = 0) -> torch.Tensor:
    drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=-1)


def shuffled_owners(pictures: int, seed: int = 0) -> torch.Tensor:
    """One to four captions a picture, in no order."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 5, (pictures,), generator=generator)
    owner = torch.arange(pictures).repeat_interleave(counts)
    return owner[torch.randperm(len(owner), generator=generator)]


def recalls_by_sorting(images, texts, owner) -> dict[str, float]:
    """The definition, by a stable sort of the whole matrix."""
    scores = (images @ texts.T).numpy()
    owner = owner.numpy()
    texts_of_image = np.argsort(-scores, axis=1, kind="stable")
    images_of_text = np.argsort(-scores.T, axis=1, kind="stable")
    found = {}
    for k in (1, 5, 10):
        hits = [i in owner[texts_of_image[i, :k]] for i in range(len(images))]
        found[f"image_to_text_recall@{k}"] = sum(hits) / len(hits)
        hits = [owner[j] in images_of_text[j, :k] for j in range(len(texts))]
        found[f"text_to_image_recall@{k}"] = sum(hits) / len(hits)
    return found


@pytest.fixture(params=[ranking.TILE_SCORES, 1, 777], ids=["one tile", "rows", "uneven tiles"])
def tile(request, monkeypatch):
    monkeypatch.setattr(ranking, "TILE_SCORES", request.param)


@pytest.mark.usefixtures("tile")
def test_recalls_are_those_of_a_whole_sort():
    owner = shuffled_owners(60)
    images = features(60)
    texts = torch.nn.functional.normalize(images[owner] + 1.5 * features(len(owner), seed=1), dim=1)
    expected = recalls_by_sorting(images, texts, owner)
    assert retrieval_recalls(images, texts, owner) == expected
    assert 0.0 < expected["image_to_text_recall@1"] < expected["image_to_text_recall@10"] < 1.0


@pytest.mark.usefixtures("tile")
def test_ties_are_those_of_a_stable_sort():
    """Scores of few different values, so that nearly all of them tie."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 2, (40, 3), generator=generator).float()
    owner = shuffled_owners(40)
    texts = torch.randint(0, 2, (len(owner), 3), generator=generator).float()
    expected = recalls_by_sorting(images, texts, owner)
    assert retrieval_recalls(images, texts, owner) == expected


def test_one_caption_each_is_what_open_clip_counts():
    train = pytest.importorskip("open_clip_train.train")
    images = features(200)
    texts = torch.nn.functional.normalize(images + 0.8 * features(200, seed=1), dim=1)
    theirs = train.get_clip_metrics(images, texts, torch.tensor(100.0))
    ours = retrieval_recalls(images, texts, torch.arange(200))
    for direction in ("image_to_text", "text_to_image"):
        for k in (1, 5, 10):
            assert ours[f"{direction}_recall@{k}"] == theirs[f"{direction}_R@{k}"]


@pytest.mark.usefixtures("tile")
def test_features_that_are_all_equal_score_as_chance():
    same = features(1).expand(50, -1)
    found = retrieval_recalls(same, same, torch.arange(50))
    for k in (1, 5, 10):
        assert found[f"image_to_text_recall@{k}"] == found[f"text_to_image_recall@{k}"] == k / 50
    labels = torch.arange(50)
    assert ranking.recall(ranking.class_ranks(same, same, labels), 5) == 5 / 50


def test_what_is_not_a_number_is_never_a_hit():
    broken = torch.full((20, 4), torch.nan)
    found = retrieval_recalls(broken, broken, torch.arange(20))
    assert set(found.values()) == {0.0}
    broken = features(20)
    broken[7] = torch.nan
    found = retrieval_recalls(broken, broken, torch.arange(20))
    assert set(found.values()) == {0.0, 19 / 20}, "one picture costs its own row and a place"


def test_class_ranks_and_fewer_classes_than_k():
    images, classes = features(100), features(4, seed=1)
    labels = torch.randint(0, 4, (100,), generator=torch.Generator().manual_seed(2))
    ranks = ranking.class_ranks(images, classes, labels)
    best = (images @ classes.T).argmax(dim=1)
    assert ranking.recall(ranks, 1) == (best == labels).sum().item() / 100
    assert ranking.recall(ranks, 5) == 1.0
