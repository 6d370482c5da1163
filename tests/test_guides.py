"""The commands of the guides run as they are printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))


@pytest.mark.slow
@pytest.mark.parametrize("guide", ["own-images"])
def test_a_guides_commands_run(guide, tmp_path):
    text = (ROOT / "docs" / "guides" / f"{guide}.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 4
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
