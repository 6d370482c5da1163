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
# # GraP in ten minutes, on digits
#
# All4One adds four terms up: `0.5 nnclr + 0.5 attn_nnclr + 2.5 byol + 2.5 barlow`. Somebody chose
# these weights by hand. GraP learns them while the model trains: each step it moves them so that
# the composite gradient at the embedding points where the gradient of an online linear probe
# points. Here both are trained on scikit-learn's digits, on the CPU.
#
# `EPOCHS` is how long each run trains; the outputs below are from the default.

# %%
import os
import tempfile
from pathlib import Path

from hydra import compose, initialize_config_dir
from IPython.display import Image, display

from grap_solo.data import evaluation_loader, load_images
from grap_solo.evaluation.offline import evaluate
from grap_solo.experiments.retrain import retrain
from grap_solo.training.run import pretrain

EPOCHS = int(os.environ.get("EPOCHS", 10))
FOLDERS = (Path.cwd(), *Path.cwd().parents)
CONFIGS = next(each / "configs" for each in FOLDERS if (each / "configs").is_dir())
os.chdir(tempfile.mkdtemp())  # The runs go here; use a folder of your own to keep them.
RUNS = Path("runs")


def configuration(file, name):
    """A file of configs/digits, with where its run goes."""
    changes = [f"name={name}", f"checkpoint.dir={RUNS}", f"max_epochs={EPOCHS}"]
    changes += ["scheduler.warmup_epochs=1", "+enable_progress_bar=false"]
    with initialize_config_dir(str(CONFIGS / "digits"), version_base="1.2"):
        return compose(file, changes)


# %% [markdown]
# ## Three runs
#
# The default weights; GraP; and the default training again with the *median* of the weights that
# GraP has found ("tuned").

# %%
default = pretrain(configuration("all4one", "default"))
grap = pretrain(configuration("grap", "grap"))
tuned = retrain([grap.directory], lambda file: configuration("grap", "grap_tuned"))

# %% [markdown]
# ## The weights over time
#
# Effective weights: what would stand before the plain losses, on the scale of the default ones.

# %%
display(Image(grap.directory / "weights.png"))

# %%
print((grap.directory / "median_weights.yaml").read_text())

# %% [markdown]
# ## What the representations are worth
#
# The linear probe is trained to convergence on frozen embeddings. With one seed and 540 validation
# images a difference of a point means nothing: `grap-solo compare` is for that.

# %%
for run in (default, grap, tuned):
    train, validation = (load_images(run.cfg.data, train=part) for part in (True, False))
    found = evaluate(
        run.model.backbone,
        evaluation_loader(run.cfg, train),
        evaluation_loader(run.cfg, validation),
    )
    print(
        f"{run.cfg.name:10}  online probe {run.accuracy:5.2f}   linear probe {found.linear:5.2f}"
        f"   k-NN {found.knn:5.2f}   RankMe {found.rankme:5.1f}"
    )

# %% [markdown]
# ## What a run leaves

# %%
for path in sorted(grap.directory.rglob("*")):
    if path.is_file():
        print(path.relative_to(RUNS))
