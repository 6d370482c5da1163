"""A run that is killed and started again ends as if it had not been, to the bit."""

import json
import os
import re
import shutil
import signal
import time

import pytest
import torch
from helpers import DIGITS, SMALL, Killed, digits, killed_at, output_of, start_command

from grap_solo import ConfigError
from grap_solo.cli import main
from grap_solo.methods import GrapAll4One
from grap_solo.training.run import pretrain

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
CHANGES = ["max_epochs=6", "knn_eval.enabled=true", "log_every_n_steps=2", "name=run"]


def configuration(directory, *overrides, file="grap"):
    return digits(directory, *CHANGES, *overrides, file=file)


def left(directory):
    """What a run leaves that must not depend on when it was interrupted."""
    run = directory / "run"
    names = ("metrics.csv", "weights.csv", "diagnostics.csv", "median_weights.yaml", "labels.csv")
    files = {name: (run / name).read_bytes() for name in names if (run / name).exists()}
    (checkpoint,) = (run / "checkpoints").glob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)
    return files, checkpoint.name, state


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_equal(first, second):
    assert first[0].keys() == second[0].keys()
    for name in first[0]:
        assert first[0][name] == second[0][name], name
    assert first[1] == second[1]
    a, b = first[2], second[2]
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for key, value in a["state_dict"].items():
        other = b["state_dict"][key]
        assert same(value, other), key
    assert same(a["optimizer_states"], b["optimizer_states"])
    assert same(a["lr_schedulers"], b["lr_schedulers"])


def start(directory, *overrides):
    """Starts a run in a process of its own, which prints into ``directory/output``."""
    changes = [*SMALL, *CHANGES, f"checkpoint.dir={directory}", *overrides]
    flags = ["--config-path", DIGITS, "--config-name", "grap"]
    return start_command(directory / "output", "pretrain", *flags, *changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    output_of(start(directory), directory / "output")
    return left(directory)


def wait_for_rows_of(epoch, run):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        rows = (run / "weights.csv").read_text() if (run / "weights.csv").exists() else ""
        if re.search(rf"^\d+,{epoch},", rows, re.MULTILINE):
            return
        time.sleep(0.01)
    raise AssertionError(f"no row of epoch {epoch}")


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [0, 2, 4])
def test_killed_anywhere_it_ends_the_same(epoch, whole, tmp_path):
    process = start(tmp_path)
    run = tmp_path / "run"
    wait_for_rows_of(epoch, run)
    time.sleep(0.05 * epoch)  # Killed a little later.
    process.kill()
    output_of(process, tmp_path / "output", -signal.SIGKILL)
    assert not (run / "trained.json").exists()
    output = output_of(start(tmp_path), tmp_path / "output")  # The same command.
    assert ("resuming after epoch" in output) or epoch == 0
    assert_equal(left(tmp_path), whole)


@pytest.mark.slow
def test_terminated_it_says_so_and_writes_what_it_has(whole, tmp_path):
    """It, and the processes that load its data."""
    process = start(tmp_path, "data.num_workers=2")
    run = tmp_path / "run"
    wait_for_rows_of(1, run)
    os.killpg(process.pid, signal.SIGTERM)
    output = output_of(process, tmp_path / "output", 128 + signal.SIGTERM)
    assert "Traceback" not in output
    (steps,) = re.findall(r"^run: stopped after step (\d+): start it again", output, re.MULTILINE)
    interrupted = run / "checkpoints" / "run-interrupted.ckpt"
    assert torch.load(interrupted, weights_only=True)["global_step"] == int(steps)
    assert len((run / "weights.csv").read_text().splitlines()) == 1 + int(steps)
    assert "weights" in (run / "median_weights.yaml").read_text()
    output_of(start(tmp_path, "data.num_workers=2"), tmp_path / "output")
    assert_equal(left(tmp_path), whole)  # The only checkpoint is the last one.


def test_a_handler_that_was_there_keeps_sigterm(tmp_path):
    from lightning.pytorch import Callback

    class Terminate(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        quiet = ["max_epochs=1", "+enable_progress_bar=false"]
        run = pretrain(configuration(tmp_path, *quiet), [Terminate()])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM] and (run.directory / "trained.json").exists()


@pytest.mark.parametrize(
    ("weighting", "moment"),
    [
        ("dwa", "on_train_epoch_start"),
        ("famo", "on_train_epoch_end"),
        ("grap_held_out", "on_validation_end"),
        ("grap_held_out", "on_train_batch_end"),
        ("vicreg", "on_train_batch_end"),
        ("vibcreg", "on_train_batch_end"),
        ("barlow_twins", "on_train_batch_end"),
        ("a method of one's own", "on_train_batch_end"),
        pytest.param(
            "compiled",
            "on_train_batch_end",
            marks=[
                pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
                pytest.mark.slow,
            ],
        ),
    ],
)
def test_every_state_comes_back(weighting, moment, tmp_path):
    """Stopped without warning at an epoch's moments, with the rules that remember most and with
    every method."""
    keys = {
        "dwa": (["+weighting={name: dwa}", "method=grap_all4one"], "all4one"),
        "famo": (["+weighting={name: famo}", "method=grap_all4one"], "all4one"),
        "grap_held_out": (
            ["+weighting.ema=0.5", "+labels={split: held_out, fraction: 0.2}",
             "optimizer.batch_size=32", "data.num_workers=1"], "grap",
        ),
        "compiled": (["+performance.compile=true", "max_epochs=2"], "grap"),
        "a method of one's own": (["method=lejepa:LeJEPA", "max_epochs=2"], "grap_vicreg"),
    }  # fmt: skip
    overrides, file = keys.get(weighting, (["max_epochs=2"], f"grap_{weighting}"))
    if not any("batch_size" in each for each in overrides):  # Three steps an epoch, of 32 images.
        overrides = ["data.fraction=0.1", "optimizer.batch_size=32", *overrides]
    overrides = ["max_epochs=3", "+limit_val_batches=2", *overrides, "+enable_progress_bar=false"]

    pretrain(configuration(tmp_path / "whole", *overrides, file=file))
    with pytest.raises(Killed):
        pretrain(configuration(tmp_path / "parts", *overrides, file=file), [killed_at(moment, 1)])
    pretrain(configuration(tmp_path / "parts", *overrides, file=file))
    assert_equal(left(tmp_path / "parts"), left(tmp_path / "whole"))


def test_killed_after_its_last_checkpoint_it_tells_what_it_would_have(tmp_path):
    quiet = ["max_epochs=2", "+enable_progress_bar=false"]
    first = pretrain(configuration(tmp_path, *quiet))
    file = tmp_path / "run" / "trained.json"
    file.unlink()
    (tmp_path / "run" / "weights.png").unlink()
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)
    assert state["seconds"] > 0
    torch.save({**state, "seconds": 1e6}, checkpoint)  # As if it had trained for so long.
    again = pretrain(configuration(tmp_path, *quiet))
    trained = json.loads(file.read_text())
    assert again.accuracy == first.accuracy == trained["online"] and trained["seconds"] > 1e6
    assert (tmp_path / "run" / "weights.png").exists()


def test_damaged_checkpoints_are_skipped_with_a_warning(tmp_path, monkeypatch):
    keep = ["+checkpoint.keep_prev=true", "+enable_progress_bar=false"]
    with pytest.raises(Killed):
        pretrain(configuration(tmp_path, *keep), [killed_at("on_train_batch_start", 3)])
    folder = tmp_path / "run" / "checkpoints"
    newest = folder / "run-ep2.ckpt"
    newest.write_bytes(newest.read_bytes()[:1000])
    (folder / "run-ep7.ckpt").write_text("foreign")
    (folder / "run-ep3.ckpt.new").write_text("cut short")
    with pytest.warns(UserWarning) as caught:
        resumed = pretrain(configuration(tmp_path, *keep))
    warned = " ".join(str(each.message) for each in caught)
    for name in (newest.name, "run-ep7.ckpt"):
        assert f"{name} is not a whole checkpoint" in warned
    assert resumed.model.weighting.updates == 18
    assert not (folder / "run-ep3.ckpt.new").exists()


def test_a_checkpoint_is_moved_into_its_place_when_it_is_whole(tmp_path, monkeypatch):
    replaced = []
    original = os.replace

    def recorded(source, target):
        if str(target).endswith(".ckpt"):
            state = torch.load(source, weights_only=True)
            others = sorted(p.name for p in target.parent.glob("*.ckpt"))
            metrics = (tmp_path / "run" / "metrics.csv").read_text()
            replaced.append((state["epoch"], others, "train_nnclr_loss_epoch" in metrics))
        original(source, target)

    monkeypatch.setattr(os, "replace", recorded)
    pretrain(configuration(tmp_path, "max_epochs=3", "+enable_progress_bar=false"))
    assert replaced == [(0, [], True), (1, ["run-ep0.ckpt"], True), (2, ["run-ep1.ckpt"], True)]


def test_a_finished_run_is_not_trained_on_nor_is_another_configuration(tmp_path):
    quiet = ["max_epochs=2", "+enable_progress_bar=false"]
    with pytest.raises(Killed):
        pretrain(configuration(tmp_path, *quiet), [killed_at("on_train_epoch_start", 1)])
    with pytest.raises(ConfigError, match="already holds a run with seed 5, not 9: set it back"):
        pretrain(configuration(tmp_path, *quiet, "seed=9"))
    pretrain(configuration(tmp_path, *quiet))
    with pytest.raises(ConfigError, match="already holds a run: give another name"):
        pretrain(configuration(tmp_path, *quiet))


def test_another_weighting_does_not_take_the_checkpoint(tmp_path):
    run = pretrain(configuration(tmp_path, "max_epochs=1", "+enable_progress_bar=false"))
    (checkpoint,) = (run.directory / "checkpoints").glob("*.ckpt")
    changes = [
        f"+resume_from_checkpoint='{checkpoint}'",
        "name=other",
        "+enable_progress_bar=false",
    ]
    for key in ("+weighting.ema=0.5", "+method_kwargs.join_feature_loss=true"):
        with pytest.raises(ConfigError, match="another weighting or other terms"):
            pretrain(configuration(tmp_path, *changes, key))
    for keys, what in (
        (["method_kwargs.proj_hidden_dim=32"], r"other networks \('projector\..*': .*, not"),
        (["backbone.name=resnet18"], r"other networks \('backbone\..*'"),
        (["optimizer.name=adamw", "~optimizer.kwargs"], "another optimizer.name than adamw"),
    ):
        message = f"^resume_from_checkpoint: .* it is of a run with {what}.*: give that run's"
        with pytest.raises(ConfigError, match=message):
            pretrain(configuration(tmp_path, *changes, *keys))
        assert not (tmp_path / "other").exists()


def test_interrupted_from_the_keyboard_it_writes_what_it_has(tmp_path, monkeypatch, capfd):
    original = GrapAll4One.training_step
    calls = []

    def interrupt(self, batch, batch_idx):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(self, batch, batch_idx)

    monkeypatch.setattr(GrapAll4One, "training_step", interrupt)
    monkeypatch.chdir(tmp_path)
    arguments = [
        "pretrain",
        "--config-path",
        str(DIGITS),
        "--config-name",
        "grap",
        *SMALL,
        *CHANGES,
    ]
    assert main([*arguments, f"checkpoint.dir={tmp_path}"]) == 130
    assert "run: stopped after step 4: start it again" in capfd.readouterr().err
    run = tmp_path / "run"
    names = {path.name for path in (run / "checkpoints").glob("*.ckpt")}
    assert names == {"run-ep0.ckpt", "run-interrupted.ckpt"}
    assert len((run / "weights.csv").read_text().splitlines()) == 1 + 4
    assert "weights" in (run / "median_weights.yaml").read_text()


def test_a_run_that_goes_on_goes_on_in_its_wandb_run(tmp_path, monkeypatch):
    asked = []

    def refuse(**kwargs):
        asked.append((kwargs["id"], kwargs["resume"]))
        raise ConnectionError("no server")

    monkeypatch.setattr("wandb.init", refuse)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    cfg = configuration(
        tmp_path, "wandb.enabled=true", "max_epochs=2", "+enable_progress_bar=false"
    )
    pretrain(cfg)
    (tmp_path / "run" / "trained.json").unlink()  # As if it had been cut short.
    pretrain(cfg)
    pretrain(configuration(tmp_path, "wandb.enabled=true", "max_epochs=1", "name=other"))
    monkeypatch.setenv("WANDB_RUN_ID", "sweep1")
    pretrain(configuration(tmp_path, "wandb.enabled=true", "max_epochs=1", "name=of_a_sweep"))
    (first, _), (again, _), (other, _), (sweep, _) = asked
    assert first == again and len({first, other, sweep}) == 3 and sweep == "sweep1"
    assert {resume for _, resume in asked} == {"allow"}


def test_a_finished_run_is_refused_in_every_process(tmp_path, monkeypatch):
    cfg = configuration(tmp_path, "max_epochs=1", "+enable_progress_bar=false")
    pretrain(cfg)
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero_only.rank", 1)
    with pytest.raises(ConfigError, match="already holds a run: give another name"):
        pretrain(cfg)
