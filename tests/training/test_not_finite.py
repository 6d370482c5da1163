"""Numbers that are not finite reach no parameter, no checkpoint and no start of a run."""

import copy

import pytest
import torch
from helpers import quiet_digits, rows_of
from lightning.pytorch import Callback

from grap_solo import ConfigError
from grap_solo.errors import Diverged
from grap_solo.evaluation.online import WeightedKNNClassifier
from grap_solo.methods.guarded import ADAPTED
from grap_solo.training.checkpoints import find_not_finite, newest_whole
from grap_solo.training.run import pretrain

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NAN = float("nan")


def spoil_gradient(module, batch):
    gradients = [each.grad for each in module.backbone.parameters() if each.grad is not None]
    gradients[0][0] = NAN


def spoil_images(module, batch):
    batch[1][0][0, 0, 0, 0] = NAN


def spoil_parameter(module, batch):
    with torch.no_grad():
        next(module.backbone.parameters())[0] = NAN


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
    updater = getattr(module, "momentum_updater", None)
    return model, optimizer.state_dict()["state"], getattr(updater, "cur_tau", None)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


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
    run = pretrain(quiet_digits(tmp_path, *block, file="all4one"), [spoil])
    (model, optimizer, tau), after = spoil.states
    assert tau == after[2] and len(model) > 100 and optimizer
    for name, value in model.items():
        if isinstance(value, dict):  # FAMO's: each step writes these losses anew.
            value.pop("losses"), after[0][name].pop("losses")
        assert same(value, after[0][name]), name
    assert same(optimizer, after[1])
    assert find_not_finite(run.model.state_dict()) is None
    skipped = [r["skipped/step"] for r in rows_of(run.directory / "metrics.csv")]
    assert [float(each) for each in skipped if each] == pytest.approx([1 / 3], abs=1e-6)


def test_a_step_that_is_not_finite_costs_those_that_it_is_accumulated_with(tmp_path):
    changes = ["+accumulate_grad_batches=3", "max_epochs=1", "scheduler.warmup_epochs=0"]
    spoil = Spoil(*CASES["gradient"], number=0)
    states = []

    class Watch(Callback):
        def on_train_start(self, trainer, module):
            states.append({k: v.detach().clone() for k, v in module.named_parameters()})

        def on_train_end(self, trainer, module):
            states.append({k: v.detach().clone() for k, v in module.named_parameters()})

    pretrain(quiet_digits(tmp_path, *changes, file="grap_vicreg"), [spoil, Watch()])
    before, after = states
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_features_that_are_not_finite_are_nobodys_neighbours():
    found = []
    for value in (None, NAN, float("inf")):
        knn = WeightedKNNClassifier(k=2)
        features, labels = torch.eye(4), torch.arange(4)
        knn.update(train_features=features, train_targets=labels)
        if value is not None:
            knn.update(
                train_features=torch.full((3, 4), value), train_targets=torch.zeros(3).long()
            )
        knn.update(test_features=features + 0.1, test_targets=labels)
        found.append(knn.compute())
    assert found[0] == found[1] == found[2] and found[0][0] == 100


@pytest.mark.parametrize(
    ("epochs", "cause"),
    [(2, "'backbone.* is not finite at its end"), (3, "no step of the last epoch was finite")],
)
def test_an_exploding_update_keeps_the_last_good_checkpoint_and_is_not_a_finished_run(
    epochs, cause, tmp_path
):
    cfg = quiet_digits(tmp_path, f"max_epochs={epochs}", file="grap_vicreg")
    spoil = Spoil("on_train_batch_start", spoil_parameter, epoch=1, number=2)
    with pytest.raises(Diverged, match=rf"{cause}, .*/run-ep0.ckpt is from bef"):
        pretrain(cfg, [spoil])
    run = tmp_path / "run"
    path, state = newest_whole(run / "checkpoints")
    assert path.name == "run-ep0.ckpt" and find_not_finite(state) is None
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
    newest = directory / "run" / "checkpoints" / "run-ep1.ckpt"
    state = torch.load(newest, weights_only=True)
    state["state_dict"]["backbone.bn1.running_var"][0] = float("inf")
    torch.save(state, newest)
    return cfg, newest


@pytest.mark.parametrize("key", ["resume_from_checkpoint", "pretrained_feature_extractor"])
def test_a_checkpoint_that_is_not_finite_is_refused(key, finished, tmp_path):
    _, newest = finished
    changes = [f"+{key}='{newest}'", "name=other"]
    with pytest.raises(ConfigError, match=rf"{key}: .*state_dict.* is not finite"):
        pretrain(quiet_digits(tmp_path, *changes, file="grap_vicreg"))


def test_a_run_resumes_from_its_newest_finite_checkpoint(finished, capsys):
    cfg, newest = finished
    with pytest.warns(UserWarning, match=r"run-ep1.ckpt is skipped: '.*' is not finite"):
        pretrain(cfg)
    assert "resuming after epoch 0" in capsys.readouterr().out
    assert find_not_finite(torch.load(newest, weights_only=True)["state_dict"]) is None
