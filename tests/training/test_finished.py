"""A run is finished when it has trained what its configuration asks for; a trial blocks nothing."""

import pytest
import torch
from helpers import quiet_digits
from lightning.pytorch import Callback
from omegaconf import OmegaConf

from grap_solo import ConfigError
from grap_solo.errors import RunStopped
from grap_solo.experiments.compare import compare
from grap_solo.training.config import prepare
from grap_solo.training.run import pretrain
from grap_solo.training.trainer import TimeOfStart
from grap_solo.training.trials import set_trial_aside

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def configuration(directory, *overrides):
    return quiet_digits(directory, "data.num_workers=0", *overrides, file="grap_vicreg")


class TimeIsOver(Callback):
    """Lets the time of a start end in the second epoch's first step."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.current_epoch == 1:
            (timer,) = [each for each in trainer.callbacks if isinstance(each, TimeOfStart)]
            timer._offset = 1e6


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return pretrain(configuration(directory))


def left(directory):
    names = ("metrics.csv", "weights.csv", "diagnostics.csv", "median_weights.yaml")
    (checkpoint,) = (directory / "checkpoints").glob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    return [(directory / name).read_bytes() for name in names], state


@pytest.mark.parametrize(
    ("key", "callbacks"), [("max_steps=4", []), ("max_time='00:01:00:00'", [TimeIsOver()])]
)
def test_a_run_that_ended_early_is_not_finished_and_resumes(key, callbacks, whole, tmp_path):
    """With the same key again, and without it, as if it had never ended."""
    run, name = tmp_path / "run", key.partition("=")[0]
    for _ in range(2):
        with pytest.raises(RunStopped, match=f"{name}: run stopped after step 4, .*not finished"):
            pretrain(configuration(tmp_path, f"+{key}"), callbacks)
        assert not (run / "trained.json").exists()
        assert {each.name for each in (run / "checkpoints").glob("*.ckpt")} == {
            "run-ep0.ckpt", "run-interrupted.ckpt"
        }  # fmt: skip
    pretrain(configuration(tmp_path))
    files, state = left(run)
    expected = left(whole.directory)
    assert files == expected[0] and (run / "trained.json").exists()
    assert all(torch.equal(v, expected[1][k]) for k, v in state.items() if torch.is_tensor(v))


def test_no_time_at_all_leaves_a_run_to_start_again(tmp_path):
    with pytest.raises(RunStopped, match="max_time: run stopped after step 0.*: start it again;"):
        pretrain(configuration(tmp_path, "+max_time='00:00:00:00'"))
    assert pretrain(configuration(tmp_path, "max_epochs=2")).accuracy is not None


def test_steps_for_all_epochs_are_a_finished_run(tmp_path):
    cfg = configuration(tmp_path, "max_epochs=1", "+max_steps=3")
    pretrain(cfg)
    assert (tmp_path / "run" / "trained.json").exists()
    with pytest.raises(ConfigError, match="already holds a run"):
        pretrain(cfg)


def test_a_callback_may_end_a_run(tmp_path):
    class Enough(Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.should_stop = True

    pretrain(configuration(tmp_path, "max_epochs=9"), [Enough()])
    assert (tmp_path / "run" / "trained.json").exists()


@pytest.mark.parametrize("key", ["fast_dev_run=true", "limit_train_batches=1"])
def test_a_trial_does_not_block_the_real_run(key, tmp_path, capsys):
    pretrain(configuration(tmp_path, f"+{key}", "max_epochs=1"))
    if key.startswith("fast"):
        assert list(tmp_path.iterdir()) == []
        assert "the trial run (fast_dev_run) went through" in capsys.readouterr().out
    run = pretrain(configuration(tmp_path, "max_epochs=1"))
    assert (run.directory / "trained.json").exists() and run.directory == tmp_path / "run"
    names = {"run"} if key.startswith("fast") else {"run", "run_trial"}
    assert {each.name for each in tmp_path.iterdir()} == names
    rows = (run.directory / "weights.csv").read_text().splitlines()
    assert len(rows) == 1 + 3


@pytest.mark.parametrize(
    ("old", "new", "aside"), [(1, 1.0, True), (1, None, True), (1.0, None, False), (1, 1, False)]
)
def test_one_batch_is_a_trial_and_all_of_them_are_not(old, new, aside, tmp_path):
    source = configuration(tmp_path)
    OmegaConf.set_struct(source, False)
    source.limit_train_batches = old
    for value in (old, new):
        if value is not None:
            source.limit_train_batches = value
        else:
            source.pop("limit_train_batches")
        if not (tmp_path / "run").exists():
            (tmp_path / "run").mkdir()
            OmegaConf.save(source, tmp_path / "run" / "config.yaml")
    assert set_trial_aside(source, prepare(source)) is aside


def test_a_comparison_resumes_runs_that_ended_early(tmp_path):
    arguments = ["knn_eval.enabled=false", "name=several"]
    directory = compare(configuration(tmp_path, *arguments, "+max_steps=4"), ["fixed"], [5])
    assert "max_steps: fixed-seed5 stopped after step 4" in (directory / "runs.csv").read_text()
    compare(configuration(tmp_path, *arguments), ["fixed"], [5])
    assert (directory / "fixed-seed5" / "result.json").exists()
    with pytest.raises(ConfigError, match="fast_dev_run: a comparison needs"):
        compare(configuration(tmp_path, *arguments, "+fast_dev_run=true"), ["fixed"], [5])
