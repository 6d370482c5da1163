"""Whole runs on the digits: the files of a run, retraining, and the command line."""

import json
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from helpers import DIGITS, ROOT, SMALL, digits, output_of, rows_of, start_command, start_process
from omegaconf import OmegaConf

from grap_solo import ConfigError
from grap_solo.cli import main
from grap_solo.compose import compose
from grap_solo.experiments.retrain import retrain
from grap_solo.methods import GrapAll4One
from grap_solo.records.weights import median_weights, read_weights
from grap_solo.training.config import prepare
from grap_solo.training.loggers import SafeWandbLogger
from grap_solo.training.run import pretrain

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def grap(tmp_path_factory):
    """One small GraP run, for the tests that only read it."""
    changes = ["knn_eval.enabled=true", "log_every_n_steps=1"]
    return pretrain(digits(tmp_path_factory.mktemp("runs"), *changes))


def test_what_a_run_leaves_behind(grap):
    directory = grap.directory
    names = {path.name for path in directory.iterdir()}
    assert names >= {
        "config.yaml",
        "metrics.csv",
        "weights.csv",
        "weights.png",
        "median_weights.yaml",
        "checkpoints",
    }
    terms, steps, weights = read_weights(directory / "weights.csv")
    assert terms == ["nnclr", "attn_nnclr", "byol", "barlow"]
    assert steps[:, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert steps[:, 1].tolist() == [0, 0, 0, 1, 1, 1]
    assert (weights > 0).all() and np.ptp(weights, axis=0).min() > 0
    first = rows_of(directory / "diagnostics.csv")[0]
    norms = np.array([float(first[f"norm/{term}"]) for term in terms])
    assert weights[0] * norms == pytest.approx(np.full(4, weights[0, 0] * norms[0]), rel=1e-3)
    median = yaml.safe_load((directory / "median_weights.yaml").read_text())["weighting"]
    assert median["name"] == "fixed"
    assert median["weights"] == pytest.approx(
        dict(zip(terms, np.median(weights, axis=0))), rel=1e-4
    )


def test_metric_names_are_solo_learns_and_the_weightings(grap):
    rows = rows_of(grap.directory / "metrics.csv")
    columns = set(rows[0])
    training = [
        "class_loss",
        "acc1",
        "acc5",
        "comb_loss",
        "nnclr_loss",
        "att_nnclr_loss",
    ]
    training += ["feature_loss", "nn_acc", "z_std", "byol_loss", "barlow_loss"]
    assert {f"train_{name}_epoch" for name in training} <= columns
    assert {
        "val_loss",
        "val_acc1",
        "val_acc5",
        "val_knn_acc1",
        "val_knn_acc5",
        "tau",
    } <= columns
    assert {f"weight/{t}" for t in ("nnclr", "attn_nnclr", "byol", "barlow")} <= columns
    assert "alignment" in columns
    last = {key: value for row in rows for key, value in row.items() if value}
    assert float(last["val_acc1"]) == pytest.approx(grap.accuracy)
    assert 10 < float(last["val_knn_acc1"]) <= 100
    total = 0.5 * (
        float(last["train_nnclr_loss_epoch"]) + float(last["train_att_nnclr_loss_epoch"])
    )
    total += 0.5 * float(last["train_feature_loss_epoch"])
    assert float(last["train_comb_loss_epoch"]) == pytest.approx(total, rel=1e-5)


def test_the_checkpoint_is_safe_to_load_and_has_solo_learns_keys(grap):
    folder = grap.directory / "checkpoints"
    (file,) = folder.glob("*.ckpt")
    state = torch.load(file, weights_only=True)["state_dict"]
    modules = {key.split(".")[0] for key in state}
    assert modules >= {
        "backbone",
        "momentum_backbone",
        "classifier",
        "projector",
        "momentum_projector",
        "predictor",
        "predictor2",
        "transformer_encoder",
        "queue",
        "queue_y",
        "queue_ptr",
        "queue_index",
        "weighting",
    }
    args = json.loads((folder / "args.json").read_text())
    assert args["method"] == "grap_all4one" and args["backbone"]["name"] == "test_resnet"
    # As solo-learn's k-NN and UMAP scripts load it.
    model = GrapAll4One.load_from_checkpoint(
        file, strict=False, cfg=OmegaConf.create(args), weights_only=True
    )
    assert torch.equal(model.backbone.conv1[0].weight, grap.model.backbone.conv1[0].weight)
    out = model.eval()(torch.randn(2, 3, 24, 24))
    assert out["feats"].shape == (2, 96) and out["z"].shape == (2, 64)


def test_a_run_repeats_from_its_config_and_seed(grap, tmp_path):
    cfg = compose(grap.directory / "config.yaml", [f"checkpoint.dir={tmp_path}"])
    again = pretrain(cfg)
    first, second = (run.directory / "weights.csv" for run in (grap, again))
    assert first.read_bytes() == second.read_bytes()
    other = pretrain(digits(tmp_path, "name=other", "seed=6"))
    assert (other.directory / "weights.csv").read_bytes() != first.read_bytes()


def test_resume_goes_on_from_the_checkpoint_and_loses_nothing(tmp_path, monkeypatch):
    taus = []
    batch_end = GrapAll4One.on_train_batch_end

    def recorded(self, *args):
        taus.append(self.momentum_updater.cur_tau)
        batch_end(self, *args)

    monkeypatch.setattr(GrapAll4One, "on_train_batch_end", recorded)
    pretrain(digits(tmp_path / "whole", "max_epochs=3", "weighting.recipe=alg1"))
    whole, taus[:] = list(taus), []
    assert len(set(whole)) == 9

    first = digits(
        tmp_path / "parts", "max_epochs=3", "log_every_n_steps=1", "weighting.recipe=alg1"
    )
    OmegaConf.set_struct(first, False)

    def stop(self, trainer, *args):  # Killed in the second epoch.
        if trainer.current_epoch == 1:
            raise EOFError

    with monkeypatch.context() as patch:
        patch.setattr("grap_solo.records.trajectory.TrajectoryRecorder.on_train_batch_start", stop)
        with pytest.raises(EOFError):
            pretrain(first)
    directory = tmp_path / "parts" / "grap-digits"
    (file,) = (directory / "checkpoints").glob("*.ckpt")
    state = torch.load(file, weights_only=True)["state_dict"]
    resuming = OmegaConf.merge(first, {"resume_from_checkpoint": str(file)})
    resumed = pretrain(resuming)
    assert taus == pytest.approx(whole)  # Step for step, across the break.
    _, steps, weights = read_weights(directory / "weights.csv")
    assert steps[:, 0].tolist() == list(range(1, 10)) and resumed.model.weighting.updates == 9
    # The first resumed step is given the weights that the checkpoint holds, up to their scale.
    saved = state["weighting.weights"].numpy()
    assert weights[3] / weights[3].sum() == pytest.approx(saved / saved.sum(), rel=1e-5)
    # What the first part had logged is still there, and the configuration starts from the start.
    steps = [row["step"] for row in rows_of(directory / "metrics.csv")]
    assert set(map(int, steps)) == set(range(9))
    assert "resume_from_checkpoint" not in (directory / "config.yaml").read_text()

    retrained = retrain([directory], lambda path: OmegaConf.load(path))
    assert retrained.directory.name == "grap-digits_tuned"
    other = digits(tmp_path / "other")
    pretrain(other)
    for name, key in (("other", "not of the run"), ("none.ckpt", "no such file")):
        OmegaConf.set_struct(other, False)
        path = file if name == "other" else tmp_path / name
        path = next((directory / "checkpoints").glob("*.ckpt")) if name == "other" else path
        with pytest.raises(ConfigError, match=f"resume_from_checkpoint: .*{key}"):
            pretrain(OmegaConf.merge(other, {"resume_from_checkpoint": str(path)}))
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    with pytest.raises(ConfigError, match="not a checkpoint, or one cut short"):
        broken = {"resume_from_checkpoint": str(tmp_path / "text.ckpt"), "name": "new"}
        pretrain(OmegaConf.merge(other, broken))


def test_the_last_epoch_is_saved_whatever_the_frequency(tmp_path):
    run = pretrain(digits(tmp_path, "max_epochs=3", "checkpoint.frequency=2"))
    (file,) = (run.directory / "checkpoints").glob("*.ckpt")
    assert file.name == "grap-digits-ep2.ckpt"
    saved = torch.load(file, weights_only=True)["state_dict"]
    assert torch.equal(saved["projector.0.weight"], run.model.projector[0].weight)


@pytest.mark.slow
def test_two_processes_train_from_the_command_line(tmp_path):
    """Lightning starts the second process with the first one's own command."""
    done = command(
        "pretrain", "--config-path", DIGITS, "--config-name", "grap.yaml", *SMALL,
        "devices=2", "+strategy=ddp", "optimizer.batch_size=32", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    directory = tmp_path / "runs" / "grap-digits"
    _, steps, weights = read_weights(directory / "weights.csv")
    assert steps[:, 0].tolist() == [1, 2, 3, 4, 5, 6] and (weights >= 0).all()
    assert (directory / "median_weights.yaml").exists()


def test_warmup_holds_the_weights_and_the_median_leaves_it_out(tmp_path):
    run = pretrain(digits(tmp_path, "weighting.warmup_epochs=1"))
    _, _, weights = read_weights(run.directory / "weights.csv")
    held, learned = weights[:3], weights[3:]
    assert np.allclose(held, held[:, :1])
    assert not np.allclose(learned[1:], learned[1:, :1])
    median = median_weights(run.directory / "weights.csv", warmup_epochs=1)
    assert list(median.values()) == pytest.approx(np.median(learned, axis=0), rel=1e-4)


def test_a_folder_of_unlabelled_images_trains_with_fixed_weights(tmp_path):
    from grap_solo.data.datasets import Digits

    (tmp_path / "images").mkdir()
    for index in range(40):
        Digits(True)[index][0].save(tmp_path / "images" / f"{index}.png")
    changes = [
        "data.dataset=custom",
        f"+data.train_path={tmp_path / 'images'}",
        "+data.no_labels=true",
        "data.fraction=-1",
        "optimizer.batch_size=16",
    ]
    run = pretrain(digits(tmp_path / "runs", *changes, file="all4one"))
    _, steps, weights = read_weights(run.directory / "weights.csv")
    assert len(steps) == 4 and (weights == [0.5, 0.5, 2.5, 2.5]).all()
    assert run.accuracy is None


def test_gradient_accumulation_writes_one_row_for_each_optimiser_step(tmp_path):
    run = pretrain(digits(tmp_path, "+accumulate_grad_batches=3"))
    _, steps, _ = read_weights(run.directory / "weights.csv")
    assert steps[:, 0].tolist() == [1, 2]


# ---- the command line -----------------------------------------------------------------------


def command(*arguments, cwd=None):
    """The installed command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "grap_solo.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
    )


def run_script(*command):
    """Runs a script as ``python SCRIPT ARGUMENTS`` does; its end is the process's."""
    sys.argv = list(map(str, command))
    runpy.run_path(sys.argv[0], run_name="__main__")


@pytest.mark.slow
def test_pretrain_and_retrain_from_the_command_line(tmp_path):
    output = tmp_path.with_name("output")
    first = ["--config-path", DIGITS, "--config-name", "grap.yaml", "name=first", *SMALL]
    output_of(start_command(output, "pretrain", *first, cwd=tmp_path), output)
    assert (tmp_path / "runs" / "first" / "median_weights.yaml").exists()
    # Its own configuration repeats it, and hydra leaves nothing beside the runs.
    again = ["--config-path", "runs/first", "--config-name", "config", "name=again"]
    output_of(start_command(output, "pretrain", *again, cwd=tmp_path), output)
    first, second = (tmp_path / "runs" / name / "weights.csv" for name in ("first", "again"))
    assert first.read_bytes() == second.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    script = ROOT / "scripts" / "retrain_median.py", "runs/first", "max_epochs=1"
    output_of(start_process(output, run_script, *script, cwd=tmp_path), output)
    _, steps, weights = read_weights(tmp_path / "runs" / "first_tuned" / "weights.csv")
    median = median_weights(tmp_path / "runs" / "first" / "weights.csv")
    assert len(steps) == 3
    assert weights == pytest.approx(np.tile(list(median.values()), (3, 1)), rel=1e-6)


def test_hydras_own_flags_work(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = ["--config-path", "configs/digits", "--config-name", "grap", "--cfg", "job"]
    assert main(["pretrain", *flags, "max_epochs=7"]) == 0
    assert "max_epochs: 7" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["pretrain", "--config-path", "nowhere", "--config-name", "grap"],
            "no such folder 'nowh",
        ),
        (["pretrain", f"--config-path={DIGITS}", "--config-name=grab"], "grab"),
        (
            [
                "pretrain",
                f"--config-path={DIGITS}",
                "--config-name=grap",
                "max_epoch=1",
            ],
            "max_epoch",
        ),
        (
            [
                "pretrain",
                f"--config-path={DIGITS}",
                "--config-name=grap",
                "max_epochs=",
            ],
            "max_epoch",
        ),
        (
            [
                "pretrain",
                f"--config-path={DIGITS}",
                "--config-name=grap",
                "weighting.lr=0",
            ],
            "weighting.lr: expected a number above 0, got 0",
        ),
        (
            [
                "pretrain",
                f"--config-path={DIGITS}",
                "--config-name=grap",
                "precision=7",
            ],
            "precision",
        ),
        (
            [
                "pretrain",
                f"--config-path={DIGITS}",
                "--config-name=grap",
                "data.dataset=custom",
                "+data.train_path=images",
            ],
            "data.train_path: no such folder images",
        ),
        (["retrain", "nowhere"], "nowhere/config.yaml: no such file"),
        (["retrain"], "give the folder of a run"),
        (
            ["run", "nowhere.py"],
            "expected one of solo-learn's scripts, got 'nowhere.py'",
        ),
        (["demo", "now"], "demo: unrecognized arguments: now"),
        (["train"], "unknown command 'train'"),
    ],
    ids=lambda value: " ".join(value)[-30:] if isinstance(value, list) else "",
)
def test_bad_input_ends_in_one_line_and_exit_code_2(
    arguments, message, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capfd.readouterr().err
    assert message in error and "Traceback" not in error
    first, *rest = error.strip().splitlines()
    assert first.startswith("grap-solo: ") and message in first
    assert not rest
    assert list(tmp_path.iterdir()) == []


def test_a_broken_yaml_file_is_one_line(tmp_path, capfd):
    (tmp_path / "broken.yaml").write_text("name: [1, 2\nmethod: x\n")
    assert main(["pretrain", f"--config-path={tmp_path}", "--config-name=broken"]) == 2
    error = capfd.readouterr().err.strip()
    assert error.startswith("grap-solo: ") and "broken.yaml" in error
    assert len(error.splitlines()) == 1


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"checkpoint\.dir: .*cannot be made"):
        pretrain(digits(tmp_path / "file"))


def test_a_run_that_is_there_is_not_written_over(grap, capfd):
    before = {path: path.stat().st_mtime_ns for path in grap.directory.rglob("*")}
    with pytest.raises(ConfigError, match=r"already holds a run: give another name"):
        pretrain(digits(grap.directory.parent))
    assert before == {path: path.stat().st_mtime_ns for path in grap.directory.rglob("*")}


def test_wandb_that_fails_is_left_out_and_the_run_goes_on(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no server")

    monkeypatch.setattr("wandb.init", refuse)
    with pytest.warns(UserWarning, match="W&B failed and is left out.*no server"):
        run = pretrain(digits(tmp_path, "wandb.enabled=true"))
    assert (run.directory / "metrics.csv").stat().st_size > 0
    assert not any(isinstance(each, SafeWandbLogger) for each in run.model.trainer.loggers)


def test_fewer_validation_images_than_processes_are_refused(tmp_path, monkeypatch):
    """One without any would leave the others waiting for its share of the means."""
    import grap_solo.training.run as module
    from grap_solo.data.images import Part

    cfg = prepare(digits(tmp_path))
    images = module.load_run(cfg.data, cfg.labels)
    one = images._replace(validation=Part(images.validation, [0]))
    monkeypatch.setattr(module, "load_run", lambda data, labels, heads: one)
    with pytest.raises(ConfigError, match="data.val_path: 1 images for 2 processes"):
        pretrain(digits(tmp_path, "devices=2", "+strategy=ddp"))
    assert not list(tmp_path.rglob("config.yaml"))
