"""The blocks of the guides run as they are printed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from grap_solo.arguments import build_parser
from grap_solo.packaged import list_packaged

DOCS = ROOT / "docs"
GUIDES = [DOCS / "start.md", *sorted((DOCS / "guides").glob("*.md"))]
FIRST = "runs/first"  # The run that the start page trains.
NOT_RUN = {"clusters", "with-solo-learn"}  # They need a cluster and solo-learn.


def blocks_of(guide, *languages):
    """The code blocks of a guide in some languages, in order: pairs of language and code."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", guide.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [(language, code) for language, code in found if language in languages]


def run_blocks(guide, folder):
    """Runs a guide's blocks in a folder: bash's as they are, Python's in one namespace. A Python
    block below a line that ends with a file's name is that file."""
    files = re.findall(r"`(\w+\.py)`:\n\n```python\n(.*?)^```", guide.read_text(), re.S | re.M)
    for name, code in files:
        (folder / name).write_text(code)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    names = {"__name__": "guide"}
    for language, code in blocks_of(guide, "sh", "python"):
        if code in dict(files).values():
            continue
        if language == "python":
            exec(compile(code, guide.name, "exec"), names)
            continue
        done = subprocess.run(
            ["bash", "-e", "-c", code],
            cwd=folder,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        names["printed"] = done.stdout
    return names


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The run of the start page."""
    folder = tmp_path_factory.mktemp("start")
    run_blocks(DOCS / "start.md", folder)
    assert (folder / FIRST / "evaluation.json").exists()
    return folder / FIRST


def check_own_images(folder, names):
    for name in ("labelled", "unlabelled"):
        weights = (folder / "runs" / name / "weights.csv").read_text().splitlines()
        assert len({line.split(",", 2)[2] for line in weights[1:]}) > 1  # They are learned.
    assert (folder / "runs" / "unlabelled" / "evaluation.json").exists()
    assert list((folder / "exported").glob("*.safetensors"))


def check_few_labels(folder, names):
    kept = (folder / "runs" / "few" / "labels.csv").read_text().splitlines()
    assert 100 < len(kept) < 150  # A tenth of 1,257.


def check_evaluate_and_export(folder, names):
    assert (folder / "my-model" / "evaluation.json").exists()

    images = torch.zeros(2, 3, 32, 32)
    assert names["model"].eval()(images).shape == (2, 96)


def check_tune_and_search(folder, names):
    assert (folder / f"{FIRST}_tuned" / "trained.json").exists()
    assert (folder / "runs" / "report" / "report.html").exists()
    trained = {each.parent.name for each in (folder / "runs" / "search").rglob("trained.json")}
    assert {"grap", "grap_tuned"} < trained and len(trained) == 4  # Two trials.


def check_own_loop(folder, names):
    assert names["step"].weights.shape == (2,) and names["projector"].weight.grad is not None


def check_downstream_heads(folder, names):
    assert re.search("digit acc1 .*ink r2 .*tags map", names["printed"])
    assert names["step"].weights.tolist() != [1, 1]


def check_lightning(folder, names):
    runs = sorted((folder / "logs").rglob("metrics.csv"))
    assert len(runs) == 4  # GraP, GraP in two processes, UPGrad, torchjd's own backward.
    assert "WithTorchjd" in names["printed"]
    weights = [run.read_text().count("weight/covariance") for run in runs]
    assert sorted(weights) == [0, 1, 1, 1]


def check_many_runs(folder, names):
    for name, results in (("two-at-a-time", 4), ("small-map", 6)):
        assert len(list((folder / "runs" / name).glob("*/result.json"))) == results


def check_search_on_many_machines(folder, names):
    search = folder / "runs" / "digits-search"
    assert len(list(search.glob("*/trained.json"))) == 6  # Four trials, GraP and its tuned run.
    assert (search / "search.md").exists()


def check_own_rule(folder, names):
    step = names["step"]
    norms = step.weights * step.statistics.gramian.diagonal().sqrt()
    assert norms[0].isclose(norms[1], rtol=1e-4)  # Every term pulls equally hard.


CHECKS = {
    "own-images": check_own_images,
    "few-labels": check_few_labels,
    "evaluate-and-export": check_evaluate_and_export,
    "tune-and-search": check_tune_and_search,
    "own-loop": check_own_loop,
    "lightning": check_lightning,
    "many-runs": check_many_runs,
    "downstream-heads": check_downstream_heads,
    "own-rule": check_own_rule,
    "search-on-many-machines": check_search_on_many_machines,
}
"""The files and values that a guide's blocks leave."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "guide", [each for each in GUIDES[1:] if each.stem not in NOT_RUN], ids=lambda each: each.stem
)
def test_the_blocks_of_a_guide_run(guide, tmp_path, monkeypatch, request):
    assert blocks_of(guide, "sh", "python")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    if FIRST in guide.read_text():
        shutil.copytree(request.getfixturevalue("first"), tmp_path / FIRST)
    monkeypatch.chdir(tmp_path)
    names = run_blocks(guide, tmp_path)
    for _, code in blocks_of(guide, "sh"):
        for name in re.findall(r"grap-solo pretrain [^;]*?\bname=(\S+)", code):
            assert (tmp_path / "runs" / name / "trained.json").exists(), name
    if guide.stem in CHECKS:
        CHECKS[guide.stem](tmp_path, names)


def test_the_guides_that_are_not_run_have_no_block_to_run():
    assert {each.stem for each in GUIDES if not blocks_of(each, "sh", "python")} == NOT_RUN


PARSERS = build_parser()[1]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda each: each.stem)
def test_every_command_of_a_guide_has_its_flags_and_configurations(guide):
    text = "".join(code for _, code in blocks_of(guide, "sh", "console")).replace("\\\n", " ")
    lines = re.findall(r"^(?:\$ )?(?:\S+=\S+ )?grap-solo (.*)$", text, flags=re.MULTILINE)
    for name, *arguments in (re.sub(r"(^|\s)#.*", "", line).split() for line in lines):
        assert name in PARSERS
        known = PARSERS[name]._option_string_actions
        for each in arguments if name != "run" else ():
            assert each in known or not re.match("--?[A-Za-z]", each), each
            if re.fullmatch("(digits|cifar10|cifar100|imagenet100|custom)/\\w+", each):
                assert each in list_packaged(), each


@pytest.mark.parametrize("guide", GUIDES, ids=lambda each: each.stem)
def test_every_configuration_file_a_guide_names_is_there(guide):
    for name in re.findall(r"`([a-z_0-9]+\.yaml)`", guide.read_text()):
        if name not in ("config.yaml", "median_weights.yaml", "terms.yaml", "training.yaml"):
            assert list((ROOT / "configs").rglob(name)), name
