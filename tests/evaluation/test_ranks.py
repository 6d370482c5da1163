"""LiDAR and alpha-ReQ against their definitions, and on embeddings that leave them nothing."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from grap_solo.evaluation.offline import rankme
from grap_solo.evaluation.ranks import Degenerate, alpha_req, lidar


def views_of(rank, images=400, views=8, width=12, noise=0.1, seed=0):
    """Embeddings whose images differ in ``rank`` directions, with noise between the views."""
    generator = np.random.default_rng(seed)
    means = generator.normal(size=(images, 1, width)) * (np.arange(width) < rank)
    return means + noise * generator.normal(size=(images, views, width))


def test_lidar_is_the_effective_rank_of_the_discriminant_matrix():
    embeddings = views_of(5)
    means = embeddings.mean(1)
    between = np.cov(means.T, bias=True)
    within = np.mean([np.cov(each.T, bias=True) for each in embeddings], axis=0)
    root = np.linalg.inv(np.real(sqrtm(within + 1e-4 * np.eye(12))))
    values = np.linalg.eigvalsh(root @ between @ root)
    shares = values / values.sum() + 1e-7
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert lidar(embeddings) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rank", [2, 5, 12])
def test_lidar_counts_directions_in_which_images_differ(rank):
    assert lidar(views_of(rank)) == pytest.approx(rank, rel=0.1)


def test_lidar_weighs_a_direction_by_the_noise_in_it_where_rankme_weighs_it_by_its_size():
    stretch = 10.0 ** -np.arange(4)
    embeddings = views_of(4, width=4)
    plain, stretched = lidar(embeddings, delta=0), lidar(embeddings * stretch, delta=0)
    assert stretched == pytest.approx(plain, rel=1e-6)
    flat = embeddings[:, 0]
    assert rankme(flat * stretch) < 0.5 * rankme(flat)


@pytest.mark.parametrize("exponent", [0.4, 1.0, 2.3])
def test_alpha_req_is_the_exponent_of_a_power_law(exponent):
    generator = np.random.default_rng(0)
    basis, _ = np.linalg.qr(generator.normal(size=(500, 64)))
    basis, _ = np.linalg.qr(basis - basis.mean(0))
    turned, _ = np.linalg.qr(generator.normal(size=(64, 64)))
    values = np.arange(1, 65.0) ** -exponent
    embeddings = (basis * np.sqrt(values)) @ turned + 3  # The mean does not count.
    assert alpha_req(embeddings.astype(np.float32)) == pytest.approx(exponent, rel=1e-3)
    assert alpha_req(embeddings * 7) == pytest.approx(exponent, rel=1e-3)


def test_what_leaves_nothing_to_compute_says_why():
    few = np.random.default_rng(0).normal(size=(100, 5)) @ np.ones((5, 40))
    with pytest.raises(Degenerate, match=r"^1 eigenvalues above rounding: 20 are needed"):
        alpha_req(few)
    with pytest.raises(Degenerate, match="1 views of 9 images: two of each are needed"):
        lidar(np.zeros((9, 1, 4)))
    with pytest.raises(Degenerate, match="embeddings are constant"):
        lidar(np.ones((9, 2, 4)))
