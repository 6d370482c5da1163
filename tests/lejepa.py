"""A method of one's own: LeJEPA's two terms (Balestriero & LeCun 2025, arXiv 2511.08544).

Train it from this folder with ``method=lejepa:LeJEPA``.
"""

import torch
from torch.nn.functional import mse_loss, normalize

from grap_solo.distributed import world_size
from grap_solo.methods import CompositeMethod, Key
from grap_solo.methods.losses import mean_with_gradient
from grap_solo.solo.projected import build_projector


class LeJEPA(CompositeMethod):
    """``invariance``: the views' mean squared difference. ``sigreg``: how far random projections of
    a view's features are from a standard normal, by Epps and Pulley's statistic."""

    method_keys = {
        "proj_hidden_dim": Key(int, 1, 256),
        "proj_output_dim": Key(int, 1, 64),
        "directions": Key(int, 1, 256),
        "lamb": Key(float, 0, 0.05),
    }
    loss_metric = "train_lejepa_loss"

    @staticmethod
    def reference_weights(cfg):
        lamb = cfg.method_kwargs.lamb
        return {"invariance": 1 - lamb, "sigreg": lamb}

    def build_networks(self):
        kwargs = self.cfg.method_kwargs
        hidden, out = kwargs.proj_hidden_dim, kwargs.proj_output_dim
        self.projector = build_projector(self.features_dim, hidden, out)

    def compute_terms(self, projections, targets):
        losses = {}
        if "invariance" in projections:
            losses["invariance"] = mse_loss(*projections["invariance"])
        if "sigreg" in projections:
            losses["sigreg"] = sum(self.sigreg(z) for z in projections["sigreg"]) / 2
        return losses

    def sigreg(self, z):
        """``N mean_a int |phi_a(t) - exp(-t^2/2)|^2 exp(-t^2) dt``, where ``phi_a`` is the joined
        batch's empirical characteristic function along the direction ``a``, of N samples."""
        generator = torch.Generator().manual_seed(self.global_step)  # The same in all processes.
        shape = z.shape[1], self.cfg.method_kwargs.directions
        directions = normalize(torch.randn(shape, generator=generator), dim=0).to(z)
        t = torch.linspace(-5, 5, 17, dtype=z.dtype, device=z.device)
        angles = (z @ directions)[:, :, None] * t
        real, imaginary = (mean_with_gradient(f(angles).mean(0)) for f in (torch.cos, torch.sin))
        distance = (real - (-t.square() / 2).exp()).square() + imaginary.square()
        per_direction = torch.trapezoid(distance * (-t.square()).exp(), t, dim=1)
        return len(z) * world_size() * per_direction.mean()
