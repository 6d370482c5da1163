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
# GraP needs three things from a method: an embedding, the terms as functions of the embedding, and
# a downstream loss, also as a function of the embedding. `balance` combines them into one scalar.
# An ordinary backward of this scalar gives every gradient of the step. This notebook uses `balance`
# in a plain loop, then in a LightningModule of your own. At the end it writes a method that
# `grap-solo`'s commands train, compare and report.
#
# The first two parts train a small denoising autoencoder on scikit-learn's digits. It has two
# terms: `reconstruction`, and `consistency` between the embeddings of two noisy views.

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
# The embeddings are a tuple with one tensor for each view. `balance` detaches them and passes them,
# in the same order, to the function of the terms and to the function of the probe's loss. The value
# of `step.loss` means nothing: call `backward()` on it, and look at `step.losses`, `step.weights`
# and `step.alignment`.

# %%
model = Autoencoder()
weighting = GraP(["reconstruction", "consistency"])
weighting.set_total_steps(EPOCHS * len(loader))  # for the weights' learning rate
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
# The cosines and norms of the last step's gradients:

# %%
for name, value in zip(diagnostic_names(weighting.terms), diagnose(step).tolist(), strict=True):
    print(f"{name:40} {value: .3f}")

# %% [markdown]
# ## A LightningModule of your own
#
# Return `step.loss` from `training_step`, and tell the weighting how long the run is. Automatic optimisation stays on, so
# gradient clipping, accumulation, schedulers, DDP and mixed precision work as they do for any
# module. The weighting is a submodule, so the checkpoint saves its state.

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

    def on_train_start(self):  # GraP's learning rate is one for the whole run.
        self.weighting.set_total_steps(self.trainer.max_epochs * self.trainer.num_training_batches)

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
for block in ({"name": "equal"}, {"name": "grap"}, {"name": "mgda"}, {"name": "upgrad"}):
    module, trainer = train_with(block)
    weights = {k: round(v.item(), 2) for k, v in trainer.callback_metrics.items()}
    print(f"{block['name']:8} probe {module.model.accuracy():.1f} %  last {weights}")

# %% [markdown]
# ## A method for `grap-solo`'s commands
#
# Derive a class from `CompositeMethod` and compute its terms. The base class does the rest of a
# step, on solo-learn's base classes or on the project's own. The example is LeJEPA (Balestriero &
# LeCun 2025, arXiv 2511.08544), which has two terms. `invariance` makes the views' projections
# agree. `sigreg` makes the projections normally distributed: it measures their distance from the
# normal distribution along random directions, with Epps and Pulley's statistic.

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
# A configuration names the class by `method: package.module:Class`. Here the module is this
# notebook, `__main__`; for a class in a file `lejepa.py`, write `grap-solo pretrain ...
# method=lejepa:LeJEPA`. All other settings are those of VICReg on the digits. The table compares
# LeJEPA's own weights with equal weights and with GraP's:

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
# One seed and a few epochs cannot rank the three. The picture shows the weights of each method, and
# dashed the reference weights:

# %%
display(Image(folder / "weights.png"))
