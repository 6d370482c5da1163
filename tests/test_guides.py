"""The commands of the guides run as they are printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))


def run_commands(guide, tmp_path):
    """Runs the blocks of a guide that are marked as a shell's; returns how many there are."""
    text = (ROOT / "docs" / "guides" / f"{guide}.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for block in blocks:
        done = subprocess.run(
            ["bash", "-e", "-c", block],
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return len(blocks)


@pytest.mark.slow
def test_the_commands_for_many_runs_run(tmp_path):
    assert run_commands("many-runs", tmp_path) == 2
    for name, results in (("two-at-a-time", 4), ("small-map", 6)):
        assert len(list((tmp_path / "runs" / name).glob("*/result.json"))) == results


@pytest.mark.slow
def test_the_commands_for_own_images_run(tmp_path):
    assert run_commands("own-images", tmp_path) == 4
    for name in ("labelled", "unlabelled"):
        assert (tmp_path / "runs" / name / "trained.json").exists()
        weights = (tmp_path / "runs" / name / "weights.csv").read_text().splitlines()
        assert len({line.split(",", 2)[2] for line in weights[1:]}) > 1  # They are learned.
    assert (tmp_path / "runs" / "unlabelled" / "evaluation.json").exists()
    assert list((tmp_path / "exported").glob("*.safetensors"))


@pytest.mark.parametrize("guide", GUIDES, ids=lambda each: each.stem)
def test_every_file_a_guide_names_is_there(guide):
    text = guide.read_text()
    for name in re.findall(r"`([a-z_0-9]+\.yaml)`", text):
        assert list((ROOT / "configs").rglob(name)), name
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (guide.parent / path).exists(), path
