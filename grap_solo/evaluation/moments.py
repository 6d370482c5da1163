"""Measures of collapse from the second moments of embeddings: RankMe and the spread."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from grap_solo.distributed import mean_over_ranks, world_size


def effective_rank(values: np.ndarray) -> float:
    """RankMe of embeddings with these singular values (Garrido et al. 2023, arXiv 2210.02885, Eq. 1
    and 2): ``exp(-sum_k p_k log p_k)`` with ``p_k = s_k / sum_j s_j + 1e-7``.

    Args:
        values: the min(N, D) singular values ``s`` of embeddings (N, D), in float64.

    Returns:
        A number between 1 and min(N, D); 0 if all values are 0.
    """
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values / total + 1e-7
    return float(np.exp(-(shares * np.log(shares)).sum()))


class EmbeddingMoments:
    """Sums from which RankMe and the spread of embeddings follow. It needs memory for D x D
    numbers, however many embeddings come.

    The sums are in float64. A singular value is the square root of an eigenvalue of ``Z^T Z``, so
    those below about 1e-8 of the largest one drown in rounding. Float32 embeddings are no more
    precise, and RankMe itself adds 1e-7 to each share.
    """

    def __init__(self) -> None:
        self.second: Tensor | None = None
        self.sums: Tensor | None = None
        self.count = 0

    def update(self, embeddings: Tensor) -> None:
        """Adds a batch of embeddings, (B, D). The host does not wait for a GPU."""
        if embeddings.device.type == "mps":  # It has no float64.
            embeddings = embeddings.cpu()
        exact = embeddings.detach().double()
        if self.second is None or self.sums is None:
            size = exact.shape[1]
            self.second, self.sums = exact.new_zeros(size, size), exact.new_zeros(2, size)
        unit = F.normalize(exact)
        self.second.addmm_(exact.T, exact)
        self.sums += torch.stack([unit.sum(0), unit.square().sum(0)])
        self.count += len(exact)

    def compute(self) -> tuple[float, float]:
        """Computes RankMe and the spread over all ranks' embeddings, and forgets these.

        The spread is ``sqrt(D)`` times the mean over the D features of the standard deviation of
        the L2-normalised embeddings (Chen & He 2021, arXiv 2011.10566, Fig. 2): near 1 if they
        point in all directions alike, 0 if they are constant.

        Returns:
            RankMe and the spread. Both are NaN if an embedding is not finite, or without any.
        """
        second, sums, seen = self.second, self.sums, self.count
        self.second, self.sums, self.count = None, None, 0
        if second is None or sums is None:
            return np.nan, np.nan
        size = len(second)
        flat = torch.cat([second.flatten(), sums.flatten(), sums.new_full((1,), seen)])
        flat = mean_over_ranks(flat).cpu() * world_size()  # One transfer from the device.
        if not flat.isfinite().all():
            return np.nan, np.nan
        count, rows = flat[-1], flat[:-1].view(-1, size)
        eigenvalues = torch.linalg.eigvalsh(rows[:size])[-min(size, round(float(count))) :]
        mean, square = rows[size:] / count
        spread = (square - mean.square()).clamp(min=0).sqrt().mean() * size**0.5
        return effective_rank(eigenvalues.clamp(min=0).sqrt().numpy()), float(spread)
