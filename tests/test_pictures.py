"""The picture of the surrogate is what its script draws."""

import runpy
import sys

import numpy as np
from helpers import ROOT
from matplotlib.image import imread


def test_the_script_draws_the_committed_picture(tmp_path, monkeypatch):
    target = tmp_path / "surrogate.png"
    monkeypatch.setattr(sys, "argv", ["surrogate.py", str(target)])
    runpy.run_path(str(ROOT / "scripts" / "surrogate.py"), run_name="__main__")
    drawn, kept = (imread(file)[..., :3] for file in (target, ROOT / "docs/images/surrogate.png"))
    assert drawn.shape == kept.shape
    assert np.abs(drawn - kept).mean() < 0.01  # Fonts may differ a little.
    assert np.abs(drawn - 1).mean() > 0.02  # An empty page would not.
