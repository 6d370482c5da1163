"""How many dimensions embeddings use, without labels: LiDAR and alpha-ReQ. RankMe is in offline."""

from __future__ import annotations

import numpy as np
from scipy.linalg import eigh

FIRST, LAST = 11, 50
"""The eigenvalues, counted from 1, to which :func:`alpha_req` fits its power law."""

ROUNDING = 1e-6
"""Embeddings that vary by less than this share of their size vary by rounding alone."""

FEWEST = 20
"""The fewest eigenvalues from which :func:`alpha_req` computes a slope."""


class Degenerate(ValueError):
    """Embeddings that leave a measure nothing to compute. The text says why, for a table."""


def lidar(embeddings: np.ndarray, delta: float = 1e-4) -> float:
    """LiDAR: the effective rank of the linear discriminant analysis that tells images apart by
    their views (Thilak et al. 2024, arXiv 2312.04000).

    Each image is a class, and its views are the samples. With the covariance ``S_b`` of the
    images' means, and the mean ``S_w`` of the views' covariances plus ``delta`` times the identity,
    it is ``exp(-sum_k p_k log p_k)`` with ``p_k = l_k / sum_j l_j + 1e-7``, where ``l`` are the
    eigenvalues of ``S_w^(-1/2) S_b S_w^(-1/2)``. It lies between 1 and min(D, N - 1).

    Args:
        embeddings: of the views of N images, (N, views, D).
        delta: is added to the variance within an image in each direction.

    Raises:
        Degenerate: fewer than two images or views, or the images' means are all the same.
    """
    images, views, width = embeddings.shape
    if images < 2 or views < 2:
        raise Degenerate(f"{views} views of {images} images: two of each are needed")
    embeddings = embeddings.astype(np.float64)
    means = embeddings.mean(1)
    between = means - means.mean(0)
    within = (embeddings - means[:, None]).reshape(-1, width)
    if not between.any():
        raise Degenerate("embeddings are constant")
    values = eigh(
        between.T @ between / images,
        within.T @ within / len(within) + delta * np.eye(width),
        eigvals_only=True,
    ).clip(min=0)
    shares = values / values.sum() + 1e-7
    return float(np.exp(-(shares * np.log(shares)).sum()))


def alpha_req(embeddings: np.ndarray) -> float:
    """alpha-ReQ: how fast the eigenvalues of the embeddings' covariance fall (Agrawal et al. 2022,
    NeurIPS). The larger it is, the fewer directions hold most of the variance; the paper finds the
    best accuracies near 1.

    It is the exponent ``a`` of the power law ``l_j ~ j^(-a)``, fitted to the eigenvalues of number
    11 to 50 by least squares of the logarithms with weights ``1 / j``, which give each octave of
    ``j`` the same weight, as in Stringer et al. 2019 (Nature 571).

    Args:
        embeddings: (N, D).

    Raises:
        Degenerate: fewer than 20 eigenvalues are above rounding.
    """
    centred = embeddings.astype(np.float64)
    centred = centred - centred.mean(0)
    values = np.linalg.eigvalsh(centred.T @ centred / len(centred))[::-1]
    above = int((values > ROUNDING**2 * np.square(embeddings, dtype=np.float64).mean()).sum())
    if above < FEWEST:
        raise Degenerate(f"{above} eigenvalues above rounding: {FEWEST} are needed")
    numbers = np.arange(FIRST, min(LAST, above) + 1)
    slope, _ = np.polyfit(np.log(numbers), np.log(values[numbers - 1]), 1, w=numbers**-0.5)
    return float(-slope)
