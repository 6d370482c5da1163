"""Runs that collapse say so once, and name the term; sound runs measure and say nothing."""

import contextlib
import warnings

import numpy as np
import pytest
from helpers import Killed, killed_at, quiet_digits, rows_of

from grap_solo.data import evaluation_loader, load_images
from grap_solo.evaluation.offline import embed, rankme
from grap_solo.records.runs import read_run
from grap_solo.training.run import pretrain

# Three steps of 16 images, with small heads.
TINY = ["data.fraction=0.05", "optimizer.batch_size=16", "data.batched=true"]
TINY += ["method_kwargs.proj_hidden_dim=32", "method_kwargs.proj_output_dim=16"]
FALLING = (
    "+weighting={name: scheduled, weights: {invariance: [25, 25, 25], variance: [25, 0, 0], "
    "covariance: [1, 1, 1]}}"
)
COLLAPSING = ["~weighting", FALLING, "optimizer.lr=20", "max_epochs=4"]


def train(directory, *overrides, file="vicreg", stop=()):
    """Trains; returns the run, None if it was killed, and the warnings of a collapse."""
    run = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with contextlib.suppress(Killed):
            run = pretrain(quiet_digits(directory, *TINY, *overrides, file=file), stop)
    said = [str(each.message) for each in caught]
    return run, [each for each in said if "collapsed" in each]


def test_a_run_that_collapses_names_the_term_once_also_when_it_is_resumed(tmp_path):
    overrides = tmp_path, *COLLAPSING
    killed, said = train(*overrides, file="grap_vicreg", stop=[killed_at("on_train_batch_end", 3)])
    assert killed is None and len(said) == 1
    assert said[0].startswith("run: the representation collapsed within ")
    assert "the weight of variance fell most, from 49 % to " in said[0]
    run, again = train(*overrides, file="grap_vicreg")
    assert again == []
    assert f"run: {read_run(run.directory).collapse.describe()}" == said[0]


def test_a_sound_run_measures_its_validation_embeddings_and_says_nothing(tmp_path):
    run, said = train(tmp_path)
    assert said == []
    rows = [row for row in rows_of(run.directory / "metrics.csv") if row["val_rankme"]]
    assert [row["epoch"] for row in rows] == ["0", "1"]
    loader = evaluation_loader(run.cfg, load_images(run.cfg.data, train=False))
    embeddings, _ = embed(run.model.backbone, loader)
    assert float(rows[-1]["val_rankme"]) == pytest.approx(rankme(embeddings), rel=1e-4)
    units = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    spread = units.std(axis=0).mean() * embeddings.shape[1] ** 0.5
    assert float(rows[-1]["val_spread"]) == pytest.approx(spread, rel=1e-4)
    assert read_run(run.directory).collapse is None
