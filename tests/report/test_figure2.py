"""Figure 2: what it shows of the three normalisations is so, and the script draws it."""

import runpy
import struct
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

from grap_solo.weighting.grap import NORMALIZATIONS, objective

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
    drawn, kept = (file.read_bytes() for file in (target, ROOT / "docs/images/figure2.png"))
    assert drawn[:8] == kept[:8] == b"\x89PNG\r\n\x1a\n"
    assert drawn[16:24] == kept[16:24] == struct.pack(">II", 1800, 550)
    assert len(drawn) < 200_000 and len(kept) < 200_000
    assert list(tmp_path.iterdir()) == [target]
