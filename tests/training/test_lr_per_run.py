"""A learning rate per run, and the paper's recipe, in trainings that are cut or accumulate."""

import pytest
from helpers import Killed, killed_at, quiet_digits
from lightning.pytorch import Callback

from grap_solo import ConfigError
from grap_solo.errors import RunStopped
from grap_solo.training.run import pretrain

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
# Three batches of 32 images an epoch, of which two make a step.
KEYS = ["data.fraction=0.1", "optimizer.batch_size=32", "+limit_val_batches=2"]
KEYS += ["weighting.recipe=paper", "weighting.lr_per_run=1.2"]


def configuration(directory, *overrides):
    return quiet_digits(directory, *KEYS, *overrides)


def test_it_is_divided_by_the_runs_batches_however_the_run_is_cut(tmp_path):
    accumulate = ["+accumulate_grad_batches=2", "+weighting.lr_schedule=optimizer"]
    whole = pretrain(configuration(tmp_path / "whole", *accumulate))
    assert whole.model.weighting.lr == 1.2 / 6  # Two epochs; it learns from each batch.
    assert whole.model.weighting.updates == 6
    with pytest.raises(Killed):
        cut = configuration(tmp_path / "parts", *accumulate)
        pretrain(cut, [killed_at("on_train_batch_end", 1)])
    again = pretrain(configuration(tmp_path / "parts", *accumulate))
    assert again.model.weighting.lr == 1.2 / 6
    for name in ("weights.csv", "diagnostics.csv", "metrics.csv"):
        files = [run.directory / name for run in (whole, again)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_start_that_ends_early_has_the_rate_of_the_whole_run(tmp_path):
    with pytest.raises(RunStopped, match="max_steps: run stopped after step 2"):
        pretrain(configuration(tmp_path, "+max_steps=2"))
    run = pretrain(configuration(tmp_path))
    assert run.model.weighting.lr == 1.2 / 6 and run.model.weighting.updates == 6


def test_both_learning_rates_are_refused_before_the_run_starts(tmp_path):
    with pytest.raises(ConfigError, match="weighting.lr_per_run: weighting.lr is given too") as it:
        pretrain(configuration(tmp_path, "weighting.lr=0.1"))
    assert "\n" not in str(it.value) and not (tmp_path / "run").exists()


class Seen(Callback):
    """Remembers the factor of the weights' learning rate, and the optimiser's learning rate."""

    def __init__(self):
        self.factors, self.rates = [], []

    def on_before_backward(self, trainer, module, loss):
        self.factors.append(module.weighting.lr_factor)
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("schedule", ["optimizer", "constant"])
def test_the_weights_learning_rate_may_follow_the_optimisers_schedule(schedule, tmp_path):
    seen = Seen()
    cfg = configuration(
        tmp_path, "max_epochs=3", "weighting.lr_per_run=null", f"+weighting.lr_schedule={schedule}"
    )
    run = pretrain(cfg, [seen])
    assert run.model.weighting.lr == 0.1 and len(seen.factors) == 9
    if schedule == "constant":
        assert set(seen.factors) == {1}
        return
    assert seen.factors == pytest.approx([rate / run.model.lr for rate in seen.rates])
    assert seen.factors[0] < 0.01 and seen.factors[2] == 1 and seen.factors[8] < 0.2
