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
# A GraP run records, at every step, the effective weights (`weights.csv`) and what the gradients
# say about each other (`diagnostics.csv`). This notebook reads both, and then checks what it has
# read by leaving a term out.

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
# A term whose weight falls to 0 is one that the probe's gradient does not want. What counts is the
# weight times the norm of the term's gradient: a small weight on a large gradient is still a lot.

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
# The cosine of each term's embedding gradient with the probe's: above 0 the term, alone, would
# lower the probe's loss, below 0 raise it. The composite's should be at least the best term's.

# %%
display(Image(RUNS / "report" / "alignment.png"))

# %%
columns = ["alignment", *(f"alignment/{term}" for term in terms)]
diagnostics[columns].groupby("epoch").median().round(3)

# %% [markdown]
# ## The Gramian
#
# The cosines of the terms' gradients with each other. Two terms near 1 say the same thing; below 0
# they are in conflict, and their sum is smaller than its parts.

# %%
display(Image(RUNS / "report" / "gramian.png"))

# %% [markdown]
# ## Left out
#
# A hypothesis is cheap to test: a term of weight 0 is not even computed. Two seeds each, without
# the term whose share of the gradient is smallest. The table says how much of the difference is
# noise.

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
