"""Figure 2: what it shows of the three normalisations is so, and the script draws it."""

import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT
from matplotlib.image import imread

from grap_solo.weighting.grap import objective
from grap_solo.weighting.grap_keys import NORMALIZATIONS

SCRIPT = ROOT / "scripts" / "figure2.py"
figure2 = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
G, G_DOWN = figure2.G, figure2.G_DOWN
PRODUCTS = G @ G_DOWN


def values(normalization):
    """The objective at every step of the path."""
    path = figure2.trajectory(normalization)
    return torch.stack([objective(w, G @ G.T, PRODUCTS, normalization) for w in path])


def test_the_vectors_tell_the_normalisations_apart():
    assert (torch.linalg.solve(G.T, G_DOWN) > 0).all()  # g_down lies between the two.
    cosines = PRODUCTS / G.norm(dim=1) / G_DOWN.norm()
    assert cosines.argmax() == 0 and PRODUCTS.argmax() == 1


def test_gradient_ends_at_the_downstream_direction():
    weights = figure2.trajectory("gradient")
    assert figure2.cosine(weights[0]) < 0.9 < 0.999 < figure2.cosine(weights[-1])
    assert figure2.cosine(figure2.maximum("gradient")) > 0.999999


def test_sum_ends_at_the_largest_product_though_it_is_badly_aligned():
    weights = figure2.trajectory("sum")
    for end in (weights[-1], figure2.maximum("sum")):
        assert end[0] == 0 and end[1] > 0
        assert torch.allclose(figure2.normalized(end, "sum"), G[1])
    assert figure2.cosine(weights[-1]) < figure2.cosine(weights[0]) - 0.1


def test_none_grows_along_the_products_without_end():
    weights = figure2.trajectory("none")
    steps = weights.diff(dim=0)
    assert torch.allclose(steps, (figure2.LEARNING_RATE * PRODUCTS).expand_as(steps), atol=1e-5)
    assert figure2.maximum("none") is None
    towards = figure2.cosine(PRODUCTS)
    assert figure2.cosine(weights[-1]) == pytest.approx(towards, abs=0.02)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_path_climbs_towards_the_maximum(normalization):
    climbed = values(normalization)
    assert (climbed.diff() > -1e-6).all() and climbed[-1] > climbed[0]
    best = figure2.maximum(normalization)
    if best is not None:
        assert climbed[-1] == pytest.approx(
            objective(best, G @ G.T, PRODUCTS, normalization).item(), abs=1e-5
        )


def test_the_script_draws_it(tmp_path, monkeypatch):
    target = tmp_path / "figure2.png"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(target)])
    figure2.main()
    drawn, kept = (imread(file)[..., :3] for file in (target, ROOT / "docs/images/figure2.png"))
    assert drawn.shape == kept.shape == (550, 1800, 3)
    assert np.abs(drawn - kept).mean() < 0.01  # Fonts may differ a little.
    assert np.abs(drawn - 1).mean() > 0.02  # An empty page would not.
    assert list(tmp_path.iterdir()) == [target]


def test_each_panel_names_its_normalisation_and_its_cosines():
    panels = figure2.figure2().axes
    assert [axes.get_title().split(":")[0] for axes in panels] == list(NORMALIZATIONS)
    for axes, normalization in zip(panels, NORMALIZATIONS):
        path = figure2.trajectory(normalization)
        assert f"{figure2.cosine(path[0]):.2f}" in axes.get_xlabel()
        starts = [line.get_xydata()[0] for line in axes.lines if line.get_marker() == "o"]
        expected = figure2.normalized(path[0], normalization).numpy()
        np.testing.assert_allclose(starts, [expected])
