"""The project's own VIbCReg (Lee & Aune 2021, arXiv 2109.00783), and iterative normalisation.

Submodule and buffer names are solo-learn's, so that state dicts move both ways.
"""

from __future__ import annotations

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from grap_solo.solo import prefer_solo_learn
from grap_solo.solo.projected import ProjectedMethod


class IterNorm(nn.Module):
    """Iterative normalisation (Huang et al. 2019, arXiv 1904.03441, Alg. 1).

    Whitens each group of features by the inverse square root of their covariance, which Newton's
    iteration approximates. Parameter and buffer names, groups and numbers are those of solo-learn's
    ``IterNorm``. The backward pass of solo-learn's changes its saved tensors and can therefore run
    only once; this one can run for each of the K inner gradients.

    Args:
        features: the number of features, D.
        groups: the intended number of groups; adjusted to divide D evenly.
        iterations: the number of Newton iterations.
        eps: added to the variances.
        momentum: the weight of a batch in the running statistics.
    """

    running_mean: Tensor
    running_wm: Tensor

    def __init__(
        self,
        features: int,
        groups: int = 64,
        iterations: int = 5,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        size = (features - 1) // groups + 1
        while features % size:
            size //= 2
        self.groups, self.size = features // size, size
        self.iterations, self.eps, self.momentum = iterations, eps, momentum
        self.weight = nn.Parameter(torch.ones(1, features))
        self.bias = nn.Parameter(torch.zeros(1, features))
        eye = torch.eye(size).expand(self.groups, size, size)
        self.register_buffer("running_mean", torch.zeros(self.groups, size, 1))
        self.register_buffer("running_wm", eye.clone())

    def forward(self, X: Tensor) -> Tensor:
        """Whitens features of shape (B, D), in float32 or better; the shape stays."""
        with torch.autocast(X.device.type, enabled=False):
            X = X.to(torch.promote_types(X.dtype, torch.float32))
            by_group = X.T.reshape(self.groups, self.size, len(X))
            if self.training:
                mean = by_group.mean(dim=2, keepdim=True)
                whitening = self._inverse_root(by_group - mean)
                with torch.no_grad():
                    for running, value in ((self.running_mean, mean), (self.running_wm, whitening)):
                        running.lerp_(value.to(running.dtype), self.momentum)
            else:
                mean, whitening = self.running_mean, self.running_wm
            white = (whitening @ (by_group - mean)).reshape(X.shape[1], len(X)).T
            return white * self.weight + self.bias

    def _inverse_root(self, centred: Tensor) -> Tensor:
        """``(cov + eps)^(-1/2)`` of each group, (groups, size, size)."""
        eye = torch.eye(self.size, dtype=centred.dtype, device=centred.device)
        covariance = centred @ centred.mT / centred.shape[2] + self.eps * eye
        trace = covariance.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        normed = covariance / trace  # The iteration converges if the norm is below 1.
        root = eye.expand_as(normed)
        for _ in range(self.iterations):
            root = 1.5 * root - 0.5 * root @ root @ root @ normed
        return root / trace.sqrt()


@prefer_solo_learn("vibcreg")
class VIbCReg(ProjectedMethod):
    """The network of VIbCReg: a projector with GELUs that may end in iterative normalisation.

    Args:
        cfg: see :class:`~grap_solo.solo.projected.ProjectedMethod`. With
            ``method_kwargs.iternorm`` the projections are whitened.
    """

    activation = nn.GELU

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        kwargs = self.cfg.method_kwargs
        last = IterNorm(kwargs.proj_output_dim) if kwargs.iternorm else nn.Identity()
        self.projector.append(last)
