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
# # Which terms does my data need?
#
# At every step, a GraP run records the effective weights (`weights.csv`) and the cosines and norms
# of the gradients (`diagnostics.csv`). This notebook reads both files and guesses which term
# matters least. It then tests the guess: it trains without that term.

# %%
import os
import tempfile
from pathlib import Path

import pandas as pd
from hydra import compose, initialize_config_dir
from IPython.display import Image, display

from grap_solo.experiments.compare import compare
from grap_solo.report.page import report
from grap_solo.training.run import pretrain

EPOCHS = int(os.environ.get("EPOCHS", 8))
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


run = pretrain(configuration("grap", "grap"))
pictures = report([run.directory], RUNS / "report")

# %% [markdown]
# ## The weights
#
# If a term's weight falls to 0, the term's gradient does not help the probe. To see how much a term
# contributes, multiply its weight by the norm of its gradient: a small weight on a large gradient
# is still a large contribution.

# %%
display(Image(RUNS / "report" / "weights.png"))

# %%
weights = pd.read_csv(run.directory / "weights.csv").set_index(["step", "epoch"])
diagnostics = pd.read_csv(run.directory / "diagnostics.csv").set_index(["step", "epoch"])
terms = list(weights)
norms = diagnostics[[f"norm/{term}" for term in terms]].set_axis(terms, axis=1)
share = weights * norms
share = share.div(share.sum(axis=1), axis=0)
pd.DataFrame({"median weight": weights.median(), "median share of the gradient": share.median()})

# %% [markdown]
# ## The alignment
#
# This is the cosine between each term's gradient and the probe's gradient, at the embedding. If it
# is above 0, a step along this term alone would lower the probe's loss. If it is below 0, the step
# would raise it. The composite gradient should be aligned at least as well as the best term's.

# %%
display(Image(RUNS / "report" / "alignment.png"))

# %%
columns = ["alignment", *(f"alignment/{term}" for term in terms)]
diagnostics[columns].groupby("epoch").median().round(3)

# %% [markdown]
# ## The Gramian
#
# These are the cosines between the terms' gradients. Two terms with a cosine near 1 ask for the
# same change. With a cosine below 0 they are in conflict: each cancels a part of the other.

# %%
display(Image(RUNS / "report" / "gramian.png"))

# %% [markdown]
# ## Training without a term
#
# The guess is cheap to test, since a term of weight 0 is not even computed. We leave out the term
# with the smallest share of the gradient, and train two seeds with it and two without. The standard
# deviations in the table show how much of the difference is noise.

# %%
least = share.median().idxmin()
kept = {"nnclr": 0.5, "attn_nnclr": 0.5, "byol": 2.5, "barlow": 2.5, least: 0.0}
without = f"without_{least}"
folder = compare(
    configuration("all4one", "leave_out"),
    methods=["fixed", without],
    seeds=[1, 2],
    definitions={without: {"weighting": {"name": "fixed", "weights": kept}}},
)
