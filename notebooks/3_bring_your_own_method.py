# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Bring your own method
#
# GraP needs three things of a method: an embedding, its terms as functions of the embedding, and a
# downstream loss as a function of it too. `balance` makes one scalar of them whose ordinary
# backward is the step. First in a plain loop, then in a LightningModule of your own, and last as a
# method that `grap-solo`'s commands train, compare and report.
#
# The method of the first two parts is a small denoising autoencoder on scikit-learn's digits with two terms:
# `reconstruction`, and `consistency` between the embeddings of two noisy views.

# %%
import logging
import os
import tempfile

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss, normalize
from torch.utils.data import DataLoader, TensorDataset

from grap_solo import GraP, balance, build_weighting
from grap_solo.diagnostics import diagnose, diagnostic_names

EPOCHS = int(os.environ.get("EPOCHS", 30))
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pl.seed_everything(0, verbose=False)
digits = load_digits()
images, labels = torch.tensor(digits.data / 16).float(), torch.tensor(digits.target)
train, test = train_test_split(range(len(images)), test_size=0.3, stratify=labels, random_state=0)
loader = DataLoader(TensorDataset(images[train], labels[train]), batch_size=64, shuffle=True)


def noisy(x):
    return x + 0.3 * torch.randn_like(x)


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
        self.decoder = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 64))
        self.probe = nn.Linear(32, 10)

    def terms(self, clean, z1, z2):
        """Both terms, from the embeddings of two noisy views."""
        reconstructed = mse_loss(self.decoder(z1), clean) + mse_loss(self.decoder(z2), clean)
        cosine = (normalize(z1) * normalize(z2)).sum(dim=1)
        return {"reconstruction": reconstructed / 2, "consistency": (1 - cosine).mean()}

    def accuracy(self):
        with torch.no_grad():
            predicted = self.probe(self.backbone(images[test])).argmax(dim=1)
        return 100 * (predicted == labels[test]).float().mean().item()


# %% [markdown]
# ## A plain loop
#
# The embeddings are a tuple, one for each view; the terms and the probe get them back, detached,
# in that order. `step.loss` is for `backward()` alone: look at `step.losses`, `step.weights` and
# `step.alignment`.

# %%
model = Autoencoder()
weighting = GraP(["reconstruction", "consistency"], lr=0.1)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for epoch in range(EPOCHS):
    for x, y in loader:
        step = balance(
            (model.backbone(noisy(x)), model.backbone(noisy(x))),
            lambda z1, z2, x=x: model.terms(x, z1, z2),
            lambda z1, z2, y=y: (cross_entropy(model.probe(z1), y) + cross_entropy(model.probe(z2), y)) / 2,
            weighting,
        )
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
    if epoch % max(1, EPOCHS // 5) == 0 or epoch == EPOCHS - 1:
        named = zip(weighting.terms, step.weights.tolist(), strict=True)
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in named)
        print(f"epoch {epoch:2}: {weights}; alignment {step.alignment:.2f}; probe {model.accuracy():.1f} %")

# %% [markdown]
# What the last step's gradients say about each other:

# %%
for name, value in zip(diagnostic_names(weighting.terms), diagnose(step).tolist(), strict=True):
    print(f"{name:40} {value: .3f}")

# %% [markdown]
# ## A LightningModule of your own
#
# Nothing else changes: automatic optimisation stays on, so gradient clipping, accumulation,
# schedulers, DDP and mixed precision work as they do for any module. The weighting is a submodule,
# so its state is saved with the checkpoint.

# %%
class LitAutoencoder(pl.LightningModule):
    def __init__(self, block):
        super().__init__()
        self.model = Autoencoder()
        self.weighting = build_weighting(block, ["reconstruction", "consistency"])

    def training_step(self, batch, batch_idx):
        x, y = batch
        step = balance(
            (self.model.backbone(noisy(x)), self.model.backbone(noisy(x))),
            lambda z1, z2: self.model.terms(x, z1, z2),
            lambda *zs: sum(cross_entropy(self.model.probe(z), y) for z in zs) / len(zs),
            self.weighting,
        )
        self.log_dict({f"weight/{k}": w for k, w in zip(self.weighting.terms, step.weights)})
        return step.loss

    def on_train_epoch_end(self):
        self.weighting.end_epoch()  # For the rules that count epochs, such as dwa.

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def train_with(block):
    pl.seed_everything(0, verbose=False)
    module = LitAutoencoder(block)
    trainer = pl.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
    )
    trainer.fit(module, loader)
    return module, trainer


# %%
for block in ({"name": "equal"}, {"name": "grap", "lr": 0.1}, {"name": "mgda"}, {"name": "upgrad"}):
    module, trainer = train_with(block)
    weights = {k: round(v.item(), 2) for k, v in trainer.callback_metrics.items()}
    print(f"{block['name']:8} probe {module.model.accuracy():.1f} %  last {weights}")

# %% [markdown]
# ## A method for `grap-solo`'s commands
#
# Derive a class from `CompositeMethod` and give its terms: everything else that a step needs is
# there, on solo-learn's base classes or the project's own. This is LeJEPA (Balestriero & LeCun
# 2025, arXiv 2511.08544): the views' projections shall agree, and shall be normally distributed,
# which Epps and Pulley's statistic tests along random directions.

# %%
from grap_solo.distributed import world_size
from grap_solo.methods import CompositeMethod, Key
from grap_solo.methods.losses import mean_with_gradient
from grap_solo.solo.projected import build_projector


class LeJEPA(CompositeMethod):
    method_keys = {
        "proj_hidden_dim": Key(int, 1, 256),
        "proj_output_dim": Key(int, 1, 64),
        "directions": Key(int, 1, 256),
        "lamb": Key(float, 0, 0.05),
    }

    @staticmethod
    def reference_weights(cfg):
        return {"invariance": 1 - cfg.method_kwargs.lamb, "sigreg": cfg.method_kwargs.lamb}

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
        generator = torch.Generator().manual_seed(self.global_step)  # The same in all processes.
        shape = z.shape[1], self.cfg.method_kwargs.directions
        directions = normalize(torch.randn(shape, generator=generator), dim=0).to(z)
        t = torch.linspace(-5, 5, 17, dtype=z.dtype, device=z.device)
        angles = (z @ directions)[:, :, None] * t
        real, imaginary = (mean_with_gradient(f(angles).mean(0)) for f in (torch.cos, torch.sin))
        distance = (real - (-t.square() / 2).exp()).square() + imaginary.square()
        per_direction = torch.trapezoid(distance * (-t.square()).exp(), t, dim=1)
        return len(z) * world_size() * per_direction.mean()


# %% [markdown]
# A configuration names it by `method: package.module:Class`; here the module is this notebook. From
# a file `lejepa.py` it is `grap-solo pretrain ... method=lejepa:LeJEPA`. The rest is the digits'
# file of VICReg. LeJEPA's own weights, equal ones, and GraP's, in one table:

# %%
from IPython.display import Image, Markdown, display

from grap_solo.experiments.compare import compare
from grap_solo.compose import CONFIGS, compose

os.chdir(tempfile.mkdtemp())  # The runs go here; use a folder of your own to keep them.
changes = ["method=__main__:LeJEPA", "name=lejepa", f"max_epochs={min(EPOCHS, 8)}"]
changes += ["scheduler.warmup_epochs=1"]
cfg = compose(CONFIGS / "digits" / "vicreg.yaml", changes)
folder = compare(cfg, methods=["fixed", "equal", "grap"], seeds=[5])
display(Markdown((folder / "summary.md").read_text()))

# %% [markdown]
# One seed and few epochs are no ranking. The weights as GraP learned them, and the reference:

# %%
display(Image(folder / "weights.png"))
