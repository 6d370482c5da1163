"""MGDA: the convex combination of the terms' gradients that is nearest to 0."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from grap_solo.weighting.base import Statistics, Weighting, treatment_keys

if TYPE_CHECKING:
    import numpy as np


class MGDA(Weighting):
    """The min-norm point of the gradients' convex hull (Désidéri 2012; Sener & Koltun 2018, Eq. 3
    and Alg. 2, with the embedding in place of the shared parameters: their MGDA-UB).

        min_w  || w^T G ||^2   with  w >= 0,  sum_k w_k = 1

    As in Alg. 2 the backbone gets the combination as it is (``scale: none``) and each head its own
    unweighted gradient (``heads: unweighted``).

    The problem is solved exactly, on the CPU in float64. Its solution is a multiple of the
    minimiser of ``|| x^T G ||^2 + (sum x - 1)^2`` over ``x >= 0``, and that is a non-negative
    least-squares problem.
    """

    keys = treatment_keys(heads="unweighted")
    needs = ("train", "scipy")
    uses_gradients = True

    def direction(self, statistics: Statistics) -> Tensor:
        gramian = statistics.gramian
        assert gramian is not None
        return gramian.new_tensor(min_norm_weights(gramian.double().cpu().numpy()))


def min_norm_weights(gramian: np.ndarray) -> np.ndarray:
    """The weights, shape (K,), of the min-norm point for a Gramian, shape (K, K).

    Gives equal weights if the Gramian is not finite or 0.
    """
    import numpy as np
    from scipy.optimize import nnls

    count = len(gramian)
    size = gramian.trace() / count
    if not np.isfinite(gramian).all() or size <= 0:
        return np.full(count, 1 / count)
    values, vectors = np.linalg.eigh(gramian / size)
    root = np.sqrt(values.clip(min=0))[:, None] * vectors.T  # root^T root is the Gramian.
    # scipy raises after 3 K iterations. A few problems need more: if a term has no gradient the
    # minimum is 0, and rounding errors bring terms in and out.
    solution, _ = nnls(
        np.vstack([root, np.ones(count)]), np.append(np.zeros(count), 1.0), maxiter=100 * count
    )
    return solution / solution.sum()
