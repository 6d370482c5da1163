"""Whole runs of every composite method: files, labels, precision, two processes, a comparison."""

import csv
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml
from helpers import DIGITS, OWN, ROOT, SMALL, method_digits

from grap_solo.cli import main
from grap_solo.methods import METHODS
from grap_solo.records.weights import read_weights
from grap_solo.training.run import pretrain

NAMES = [*METHODS, OWN]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "all4one"])
def test_labels_diagnostics_batched_views_and_precision_work_with_it(name, tmp_path):
    changes = ["+labels={split: held_out, fraction: 0.4}", "optimizer.batch_size=32",
               "data.batched=true", "precision=bf16-mixed", "log_every_n_steps=1"]  # fmt: skip
    run = pretrain(method_digits(name, tmp_path, *changes))
    terms, steps, weights = read_weights(run.directory / "weights.csv")
    assert tuple(terms) == run.model.weighting.terms and np.isfinite(weights).all()
    assert np.ptp(weights, axis=0).min() > 0 and run.accuracy > 0
    metrics = list(csv.DictReader((run.directory / "metrics.csv").open()))
    logged = {key.removesuffix("_step") for key in metrics[0]}
    assert {f"train_{term}_loss" for term in terms} < logged
    assert {run.model.loss_metric, "train_z_std", "train_labelled_acc1", "alignment"} < logged
    written = yaml.safe_load((run.directory / "terms.yaml").read_text())
    assert written["weighting"] == "grap" and list(written["reference_weights"]) == terms
    assert written["method"] == (OWN if name == OWN else f"grap_{name}")


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_its_backbone_is_compiled_where_it_has_no_momentum_network(tmp_path):
    changes = ["+performance.compile=true", "max_epochs=1", "+limit_train_batches=2",
               "+limit_val_batches=1"]  # fmt: skip
    run = pretrain(method_digits("vicreg", tmp_path, *changes))
    assert run.model.backbone._compiled_call_impl is not None
    assert run.model.projector._compiled_call_impl is None
    _, _, weights = read_weights(run.directory / "weights.csv")
    assert np.isfinite(weights).all() and len(weights) == 2


@pytest.mark.parametrize("name", [name for name in NAMES if name != "all4one"])
def test_parameter_space_and_clipping_and_accumulation_work_with_it(name, tmp_path):
    changes = ["+diagnostics.parameter_space_every=2", "+accumulate_grad_batches=2",
               "+gradient_clip_val=0.5", "max_epochs=1"]  # fmt: skip
    run = pretrain(method_digits(name, tmp_path, *changes))
    rows = list(csv.DictReader((run.directory / "diagnostics.csv").open()))
    measured = [float(row["parameter_space"]) for row in rows]
    assert np.isfinite(measured).any() and {row["skipped"] for row in rows} == {""}


SCRIPT = """
import json, sys, torch
import torch.distributed as dist
from pathlib import Path
from grap_solo.compose import compose
from grap_solo.training.run import pretrain

file, directory, *overrides = sys.argv[1:]
run = pretrain(compose(Path(file), overrides))
same = []
for value in [*run.model.parameters(), *run.model.weighting.state_dict().values()]:
    parts = [torch.empty_like(value) for _ in range(2)]
    dist.all_gather(parts, value.detach().contiguous())
    same.append(torch.equal(*parts))
Path(directory, f"{dist.get_rank()}.json").write_text(json.dumps(all(same)))
"""


@pytest.mark.parametrize("name", ["grap_vibcreg", "grap_barlow_twins"])
def test_it_trains_in_two_processes_which_stay_the_same(name, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    overrides = ["+data.fraction=0.2", "max_epochs=1", "devices=2", "+strategy=ddp", "name=run",
                 "optimizer.batch_size=31", f"checkpoint.dir={tmp_path}",
                 "+enable_progress_bar=false"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "2",
         "--master-port", str(32500 + os.getpid() % 1000), script, DIGITS / f"{name}.yaml",
         tmp_path, *overrides],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert {(tmp_path / f"{rank}.json").read_text() for rank in (0, 1)} == {"true"}
    _, steps, weights = read_weights(tmp_path / "run" / "weights.csv")
    assert len(steps) == 251 // 62 and np.ptp(weights, axis=0).max() > 0


def test_a_method_of_ones_own_is_compared_and_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT / "tests")
    flags = ["compare", "--config-path", str(DIGITS), "--config-name", "vicreg", *SMALL,
             "methods=[fixed,grap,grap_tuned]", "seeds=[1]", "name=own", f"method={OWN}",
             f"checkpoint.dir={tmp_path}"]  # fmt: skip
    assert main(flags) == 0
    table = list(csv.DictReader((tmp_path / "own" / "summary.csv").open()))
    assert [row["method"] for row in table] == ["fixed", "grap", "grap_tuned"]
    assert all(row["failed"] == "0" and float(row["linear_mean"]) > 10 for row in table)
    assert float(table[0]["weight/sigreg"]) == pytest.approx(0.05)
    page = (tmp_path / "own" / "report.html").read_text()
    assert "sigreg" in page and "dashed, the method&#39;s reference weights" in page
    assert re.search(r"own-seed1|grap-seed1", page)
