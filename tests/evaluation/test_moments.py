"""RankMe and the spread from second moments are those of the embeddings themselves."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from grap_solo.evaluation.moments import EmbeddingMoments
from grap_solo.evaluation.offline import rankme


def measure(*batches):
    moments = EmbeddingMoments()
    for batch in batches:
        moments.update(batch)
    return moments.compute()


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


EMBEDDINGS = {
    "many": draw(300, 24),
    "fewer than dimensions": draw(10, 24),
    "one": draw(1, 24),
    "not negative": draw(200, 32).relu(),
    "of very different sizes": draw(200, 16) * 10.0 ** -torch.arange(16),
    "of low rank": draw(200, 3) @ draw(3, 24, seed=1),
    "constant": draw(24).expand(100, 24),
    "nearly constant": 1 + 1e-3 * draw(100, 24),
    "zero": torch.zeros(20, 24),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_they_are_those_of_the_whole_matrix(name):
    embeddings = EMBEDDINGS[name]
    found, spread = measure(*embeddings.split(64))
    assert found == pytest.approx(rankme(embeddings.numpy()), rel=1e-5)
    features = F.normalize(embeddings.double()).std(dim=0, correction=0)
    expected = features.mean().item() * embeddings.shape[1] ** 0.5
    assert spread == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_the_spread_is_1_in_all_directions_and_0_in_one():
    assert measure(draw(5000, 32))[1] == pytest.approx(1, abs=0.02)
    lengths = torch.linspace(1, 9, 50)[:, None]  # The direction counts, not the length.
    assert measure(lengths * draw(32))[1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_gives_nan_and_is_forgotten(bad):
    moments, embeddings = EmbeddingMoments(), draw(8, 4)
    assert np.isnan(moments.compute()).all()
    moments.update(embeddings)
    moments.update(torch.full((8, 4), bad))
    assert np.isnan(moments.compute()).all()
    moments.update(embeddings)
    assert moments.compute() == measure(embeddings)


def test_it_draws_no_random_number_and_keeps_only_sums():
    before, moments = torch.get_rng_state(), EmbeddingMoments()
    for number in range(3):
        moments.update(draw(50, 4, seed=number))
    kept = [each for each in vars(moments).values() if isinstance(each, torch.Tensor)]
    assert sorted(each.numel() for each in kept) == [2 * 4, 4 * 4]
    moments.compute()
    assert torch.equal(torch.get_rng_state(), before)
