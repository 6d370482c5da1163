"""The README's example runs as it stands."""

import re
from pathlib import Path

import torch

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_plain_loop_runs_and_learns_weights(capsys):
    (setup, loop) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[:2]
    assert len(loop.strip().splitlines()) <= 10
    torch.manual_seed(0)
    names: dict = {}
    exec(setup + loop, names)
    assert names["step"].weights.shape == (2,)
    assert not torch.equal(names["weighting"].weights, torch.ones(2))


def test_every_file_it_names_is_there():
    root = Path(__file__).parents[1]
    paths = re.findall(r"\]\(([^)#:]+)\)", README)
    assert paths
    for path in paths:
        assert (root / path).exists(), path
