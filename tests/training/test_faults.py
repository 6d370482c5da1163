"""What goes wrong in a run: the step is left out and counted, or the run ends with the reason."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import DIGITS, SMALL, output_of, quiet_digits, rows_of, start_process

from grap_solo import ConfigError
from grap_solo.cli import main
from grap_solo.data.datasets import Digits
from grap_solo.errors import RunStopped
from grap_solo.methods import CompositeMethod, GrapAll4One
from grap_solo.records.weights import read_weights
from grap_solo.training.checkpoints import EpochCheckpoint, newest_whole
from grap_solo.training.run import pretrain
from grap_solo.weighting import WEIGHTINGS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TERMS = ("nnclr", "attn_nnclr", "byol", "barlow")


def spoil(monkeypatch, change, at=(1, 2)):
    """Changes the terms' losses at some calls."""
    calls = []
    original = GrapAll4One.compute_terms

    def changed(self, *args):
        losses = original(self, *args)
        calls.append(1)
        return change(losses) if at is None or len(calls) - 1 in at else losses

    monkeypatch.setattr(GrapAll4One, "compute_terms", changed)


def skipped(run):
    """The share of its steps that each epoch has skipped."""
    found = [row["skipped/step"] for row in rows_of(run.directory / "metrics.csv")]
    return [float(share) for share in found if share]


def assert_whole(run, steps=6):
    """Everything finite, and a row for every step."""
    assert all(p.isfinite().all() for p in run.model.parameters())
    assert all(b.isfinite().all() for b in run.model.buffers())
    _, rows, weights = read_weights(run.directory / "weights.csv")
    assert rows[:, 0].tolist() == list(range(1, steps + 1)) and np.isfinite(weights).all()
    assert (run.directory / "trained.json").exists()


@pytest.mark.parametrize("file", ["grap", "all4one"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("names", [("byol",), TERMS], ids=["one", "all"])
def test_a_term_that_is_not_finite_costs_that_step(names, value, file, tmp_path, monkeypatch):
    spoil(
        monkeypatch, lambda losses: {k: v * value if k in names else v for k, v in losses.items()}
    )
    run = pretrain(quiet_digits(tmp_path, file=file))
    assert_whole(run)
    skipped = [
        float(r["skipped/step"])
        for r in rows_of(run.directory / "metrics.csv")
        if r["skipped/step"]
    ]
    assert skipped == pytest.approx([2 / 3, 0], abs=1e-6)


def test_a_probe_that_is_not_finite_costs_that_step(tmp_path, monkeypatch):
    original, calls = CompositeMethod.downstream_loss, []

    def spoiled(self, embeddings, labels):
        calls.append(1)
        return original(self, embeddings, labels) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(CompositeMethod, "downstream_loss", spoiled)
    run = pretrain(quiet_digits(tmp_path))
    assert_whole(run)
    skipped = [
        float(r["skipped/step"])
        for r in rows_of(run.directory / "metrics.csv")
        if r["skipped/step"]
    ]
    assert skipped == pytest.approx([1 / 3, 0], abs=1e-6)


def test_too_many_in_a_row_stop_the_run_with_its_files_whole(tmp_path, monkeypatch, capfd):
    spoil(monkeypatch, lambda losses: {**losses, "nnclr": losses["nnclr"] * float("nan")},
          at=range(4, 100))  # fmt: skip
    changes = ["max_epochs=5", "+diagnostics.max_skipped_steps=3"]
    with pytest.raises(RunStopped, match=r"3 steps in a row were not finite \(nnclr\)"):
        pretrain(quiet_digits(tmp_path, *changes))
    run = tmp_path / "run"
    _, steps, weights = read_weights(run / "weights.csv")
    assert np.isfinite(weights).all() and len(steps) == 6
    _, state = newest_whole(run / "checkpoints")
    assert all(v.isfinite().all() for v in state["state_dict"].values() if torch.is_tensor(v))
    assert (run / "median_weights.yaml").exists() and not (run / "trained.json").exists()


def zero(losses, name="byol"):
    return {**losses, name: losses[name] * 0}


CASES = {
    "a term without gradient": (lambda losses: zero(losses), ""),
    "no term with a gradient": (
        lambda losses: {k: v * 0 for k, v in losses.items()}, "no composite gradient"
    ),
    "a constant term": (lambda losses: {**losses, "byol": torch.ones(())}, ""),
    "two identical terms": (lambda losses: {**losses, "byol": losses["barlow"]}, ""),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rule", ["grap", "mgda", "gradnorm", "upgrad", "imtl_g", "dwa"])
def test_dull_terms_train_on(case, rule, tmp_path, monkeypatch):
    change, cause = CASES[case]
    spoil(monkeypatch, change, at=None)
    block = f"+weighting={{name: {rule}}}"
    changes = [block, "method=grap_all4one", "max_epochs=1"]
    run = pretrain(quiet_digits(tmp_path, *changes, file="all4one"))
    assert_whole(run, steps=3)
    if rule == "grap":
        causes = [row["skipped"] for row in rows_of(run.directory / "diagnostics.csv")]
        assert set(causes) == {cause}
        if case == "two identical terms":
            weights = run.model.weighting.weights
            assert weights[2] == weights[3]


def test_products_that_are_all_negative_never_leave_the_weights_at_zero():
    from grap_solo import GraP, Statistics

    for normalization in ("gradient", "sum", "none"):
        weighting = GraP(["a", "b"], lr=0.5, normalization=normalization, recipe="alg1")
        gramian = torch.tensor([[1.0, 0.2], [0.2, 2.0]])
        for _ in range(100):
            effective = weighting(
                Statistics(torch.ones(2), gramian, torch.tensor([-1.0, -0.5]), torch.tensor(1.0))
            )
            assert effective.isfinite().all() and weighting.weights.any()
            assert weighting.weights.min() >= 0


@pytest.mark.parametrize("rule", [name for name in WEIGHTINGS if WEIGHTINGS[name].needs_labels])
def test_a_rule_that_needs_labels_is_refused_without_any(rule, tmp_path, monkeypatch):
    changes = ["method=grap_all4one", f"+weighting={{name: {rule}}}"]
    message = f"no image has a label, but '{rule}' learns from labels: give labels, or label"
    with pytest.raises(ConfigError, match=f"^data.no_labels: {message}"):
        pretrain(quiet_digits(tmp_path, *changes, "+data.no_labels=true", file="all4one"))
    original = Digits.__init__

    def unlabel(self, train):
        original(self, train)
        self.targets = np.where(train, -1, self.targets)

    monkeypatch.setattr(Digits, "__init__", unlabel)
    message = f"^data.train_path: no training image has a label, but '{rule}' learns from labels"
    with pytest.raises(ConfigError, match=message):
        pretrain(quiet_digits(tmp_path, *changes, "++data.fraction=-1", file="all4one"))
    assert not list(tmp_path.iterdir())


def test_a_rule_that_needs_no_labels_trains_without_any(tmp_path):
    run = pretrain(quiet_digits(tmp_path, "+data.no_labels=true", file="all4one"))
    assert_whole(run)
    assert run.accuracy is None


def test_a_worker_that_dies_ends_in_one_line(tmp_path, monkeypatch, capfd):
    original = Digits.__getitem__

    def dies(self, index):
        if torch.utils.data.get_worker_info() is not None and index % 7 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, index)

    monkeypatch.setattr(Digits, "__getitem__", dies)
    flags = ["--config-path", str(DIGITS), "--config-name", "grap", *SMALL]
    changes = [f"checkpoint.dir={tmp_path}", "data.num_workers=1", "+num_sanity_val_steps=0"]
    assert main(["pretrain", *flags, *changes]) == 2
    error = capfd.readouterr().err
    assert "data.num_workers: a process that loads data has died" in error
    assert "Traceback" not in error


def train_on_a_full_disk(arguments):
    """A limit on the size of files stands in for the disk: the second checkpoint does not fit."""
    import resource

    save = EpochCheckpoint._save

    def limited(self, trainer, module, epoch):
        if epoch == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        save(self, trainer, module, epoch)

    EpochCheckpoint._save = limited
    return main(arguments)


def test_a_full_disk_ends_in_one_line_and_the_last_checkpoint_stays(tmp_path):
    flags = ["--config-path", str(DIGITS), "--config-name", "grap", *SMALL]
    changes = ["max_epochs=3", "name=run", f"checkpoint.dir={tmp_path}"]
    output = tmp_path / "output"
    process = start_process(output, train_on_a_full_disk, ["pretrain", *flags, *changes])
    printed = output_of(process, output, 2)
    lines = [line for line in printed.splitlines() if line.startswith("grap-solo: ")]
    assert len(lines) == 1 and "cannot be written to" in lines[0], printed[-2000:]
    path, _ = newest_whole(tmp_path / "run" / "checkpoints")
    assert path.name == "run-ep0.ckpt"


def test_wandb_that_is_not_installed_is_left_out(tmp_path, monkeypatch):
    import lightning.pytorch.loggers.wandb as logger

    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(logger, "_WANDB_AVAILABLE", False)
    with pytest.warns(UserWarning, match="W&B failed and is left out"):
        run = pretrain(quiet_digits(tmp_path, "wandb.enabled=true"))
    assert_whole(run)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("+diagnostics.max_skipped_steps=0", "max_skipped_steps: expected a whole number of 1"),
        ("+diagnostics.max_skiped_steps=5", "did you mean 'max_skipped_steps'"),
        ("+data.num_worker=2", "did you mean 'num_workers'"),
        ("+checkpoint.frequncy=2", "did you mean 'frequency'"),
        ("+max_epoch=3", "configuration: unknown name 'max_epoch': did you mean 'max_epochs'"),
        ("+method_kwargs.queue_sise=64", "did you mean 'queue_size'"),
    ],
)
def test_unknown_keys_are_named_before_any_data_is_read(key, message, tmp_path, monkeypatch):
    monkeypatch.setattr("grap_solo.training.run.load_run", None)
    with pytest.raises(ConfigError, match=message):
        pretrain(quiet_digits(tmp_path, key))
    assert list(Path(tmp_path).iterdir()) == []


def test_what_ends_a_run_before_its_first_row_is_what_is_raised(tmp_path):
    from lightning.pytorch import Callback

    class Fails(Callback):
        def on_train_batch_end(self, *args):
            raise ArithmeticError("of the callback's own")

    with pytest.raises(ArithmeticError, match="of the callback's own"):
        pretrain(quiet_digits(tmp_path), [Fails()])
    assert not (tmp_path / "run" / "median_weights.yaml").exists()
