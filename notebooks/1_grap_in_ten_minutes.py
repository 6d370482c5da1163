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
# All4One's loss is a weighted sum of four terms: `0.5 nnclr + 0.5 attn_nnclr + 2.5 byol + 2.5
# barlow`. Its authors chose these weights by hand. GraP learns the weights while the model trains.
# At each step it moves them so that the gradient of the weighted sum, at the backbone's embedding,
# points the same way as the gradient of an online linear probe. This notebook trains All4One both
# ways on scikit-learn's digits, on the CPU.
#
# `EPOCHS` sets how long each run trains. The outputs below are from the default.

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
# The first run holds the default weights. The second learns them with GraP. The third trains from
# scratch again and holds the *median* of the weights that GraP has learned ("tuned").

# %%
default = pretrain(configuration("all4one", "default"))
grap = pretrain(configuration("grap", "grap"))
tuned = retrain([grap.directory], lambda file: configuration("grap", "grap_tuned"))

# %% [markdown]
# ## The weights over time
#
# The picture shows the effective weights: the multipliers that would stand before the plain losses,
# on the scale of the default weights.

# %%
display(Image(grap.directory / "weights.png"))

# %%
print((grap.directory / "median_weights.yaml").read_text())

# %% [markdown]
# ## How good the representations are
#
# The linear probe is trained to convergence on frozen embeddings. With one seed and 540 validation
# images, a difference of a point means nothing. To compare methods, train several seeds with
# `grap-solo compare`.

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
# ## The files that a run leaves

# %%
for path in sorted(grap.directory.rglob("*")):
    if path.is_file():
        print(path.relative_to(RUNS))
