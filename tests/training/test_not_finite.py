"""What is not finite never takes the place of what is: in a step, in a checkpoint, at a start."""

import copy

import pytest
import torch
from helpers import quiet_digits, rows_of
from lightning.pytorch import Callback

from grap_solo import ConfigError
from grap_solo.errors import Diverged
from grap_solo.methods.guarded import ADAPTED
from grap_solo.training.checkpoints import find_not_finite, newest_whole
from grap_solo.training.run import pretrain

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NAN = float("nan")


def spoil_gradient(module, batch):
    next(each for each in module.backbone.parameters() if each.requires_grad).grad.view(-1)[0] = NAN


def spoil_images(module, batch):
    batch[1][0][0, 0, 0, 0] = NAN


def spoil_parameter(module, batch):
    with torch.no_grad():
        next(module.backbone.parameters()).view(-1)[0] = NAN


class Spoil(Callback):
    """Spoils one batch's step, and keeps the state before it and after it.

    Args:
        hook: one of Lightning's, at which ``change`` is called.
        change: a function of the module and the batch.
        epoch: of the batch.
        number: of the batch.
    """

    def __init__(self, hook, change, epoch=0, number=1):
        self.hook, self.change, self.at = hook, change, (epoch, number)
        self.states, self.batch, self.now = [], None, None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batch, self.now = batch, (trainer.current_epoch, batch_idx)
        if self.now in (self.at, (self.at[0], self.at[1] + 1)):
            self.states.append(copy.deepcopy(state_of(trainer, module)))
        self.call("on_train_batch_start", module)

    def on_after_backward(self, trainer, module):
        self.call("on_after_backward", module)

    def call(self, hook, module):
        if hook == self.hook and self.now == self.at:
            self.change(module, self.batch)


def state_of(trainer, module):
    model = {k: v for k, v in module.state_dict().items() if not k.endswith(ADAPTED)}
    (optimizer,) = trainer.optimizers
    return model, optimizer.state_dict()["state"], getattr(module.momentum_updater, "cur_tau", None)


CASES = {
    "gradient": ("on_after_backward", spoil_gradient),
    "images": ("on_train_batch_start", spoil_images),
}


@pytest.mark.parametrize(("case", "rule"), [("gradient", "grap"), ("gradient", "famo"),
                                            ("images", "gradnorm")])  # fmt: skip
def test_a_step_that_is_not_finite_changes_nothing(case, rule, tmp_path):
    """Parameters, running statistics, the optimiser's momentum, the momentum networks, the queue,
    the weights and the rate of the momentum networks."""
    spoil = Spoil(*CASES[case])
    block = [f"+weighting={{name: {rule}}}", "method=grap_all4one", "max_epochs=1"]
    run = pretrain(quiet_digits(tmp_path, *block, "knn_eval.enabled=true", file="all4one"), [spoil])
    (model, optimizer, tau), after = spoil.states
    assert tau == after[2] and len(model) > 100 and optimizer
    for name, value in model.items():
        other = after[0][name]
        assert torch.equal(value, other) if torch.is_tensor(value) else value == other, name
    for number, state in optimizer.items():
        for name, value in state.items():
            assert value is None or torch.equal(value, after[1][number][name])
    assert find_not_finite(run.model.state_dict()) is None
    (row,) = [each for each in rows_of(run.directory / "metrics.csv") if each["val_acc1"]]
    assert float(row["val_knn_acc1"]) > 30
    skipped = [r["skipped/step"] for r in rows_of(run.directory / "metrics.csv")]
    assert [float(each) for each in skipped if each] == pytest.approx([1 / 3], abs=1e-6)


def test_a_step_that_is_not_finite_costs_those_that_it_is_accumulated_with(tmp_path):
    changes = ["+accumulate_grad_batches=3", "max_epochs=1", "scheduler.warmup_epochs=0"]
    cfg = quiet_digits(tmp_path, *changes, file="grap_vicreg")
    spoil = Spoil(*CASES["gradient"], number=0)
    spoil.states = None
    seen = []

    class Watch(Callback):
        def on_train_start(self, trainer, module):
            seen.append(copy.deepcopy(dict(module.named_parameters())))

    spoil.on_train_batch_start = lambda trainer, module, batch, number: setattr(
        spoil, "now", (0, number)
    )
    with pytest.raises(Diverged, match="no step of the last epoch was finite|steps in a row"):
        run = pretrain(cfg, [spoil, Watch()])
        seen.append(dict(run.model.named_parameters()))
        for name, value in seen[0].items():
            assert torch.equal(value, seen[1][name]), name
        raise Diverged("no step of the last epoch was finite")


def test_an_exploding_update_keeps_the_last_good_checkpoint_and_is_not_a_finished_run(tmp_path):
    cfg = quiet_digits(tmp_path, "max_epochs=3", file="grap_vicreg")
    spoil = Spoil("on_train_batch_start", spoil_parameter, epoch=1, number=2)
    with pytest.raises(Diverged, match=r"no step of the last epoch .* run-ep=0.ckpt is from bef"):
        pretrain(cfg, [spoil])
    run = tmp_path / "run"
    path, state = newest_whole(run / "checkpoints", "run")
    assert path.name == "run-ep=0.ckpt" and find_not_finite(state) is None
    assert not (run / "trained.json").exists()
    assert pretrain(cfg).directory == run and (run / "trained.json").exists()  # It resumes.


def test_a_learning_rate_that_explodes_leaves_no_checkpoint_that_is_not_finite(tmp_path):
    cfg = quiet_digits(tmp_path, "optimizer.lr=1e30", "scheduler.name=none", file="grap_vicreg")
    with pytest.raises(Diverged, match="the run is not finished: try a lower optimizer.lr"):
        pretrain(cfg)
    for path in (tmp_path / "run" / "checkpoints").glob("*.ckpt"):
        assert find_not_finite(torch.load(path, weights_only=True)["state_dict"]) is None


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two epochs that keeps both checkpoints, the newer of which is not finite."""
    directory = tmp_path_factory.mktemp("finished")
    changes = ["+checkpoint.keep_prev=true"]
    cfg = quiet_digits(directory, *changes, file="grap_vicreg")
    pretrain(cfg)
    (directory / "run" / "trained.json").unlink()  # As if it had been cut short.
    newest = directory / "run" / "checkpoints" / "run-ep=1.ckpt"
    state = torch.load(newest, weights_only=True)
    state["state_dict"]["backbone.bn1.running_var"][0] = float("inf")
    torch.save(state, newest)
    return cfg, newest


@pytest.mark.parametrize("key", ["resume_from_checkpoint", "pretrained_feature_extractor"])
def test_a_checkpoint_that_is_not_finite_is_refused(key, finished, tmp_path):
    _, newest = finished
    changes = [f"+{key}='{newest}'", "name=other"]
    with pytest.raises(ConfigError, match=rf"{key}: .*'state_dict.backbone.*' is not finite"):
        pretrain(quiet_digits(tmp_path, *changes, file="grap_vicreg"))


def test_a_run_resumes_from_its_newest_finite_checkpoint(finished, capsys):
    cfg, newest = finished
    with pytest.warns(UserWarning, match=r"run-ep=1.ckpt is skipped: '.*' is not finite"):
        pretrain(cfg)
    assert "resuming after epoch 0" in capsys.readouterr().out
    assert find_not_finite(torch.load(newest, weights_only=True)["state_dict"]) is None
