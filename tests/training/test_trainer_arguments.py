"""A Trainer argument in a configuration is obeyed or refused, never ignored."""

import pytest
import yaml
from helpers import quiet_digits
from omegaconf import OmegaConf

from grap_solo import ConfigError
from grap_solo.training.checkpoints import Start
from grap_solo.training.config import prepare
from grap_solo.training.schema import Configuration
from grap_solo.training.trainer import make_trainer
from grap_solo.training.trainer_keys import ARGUMENTS, REFUSED

OBEYED = {
    "fast_dev_run", "min_epochs", "max_steps", "min_steps", "max_time", "limit_train_batches",
    "limit_val_batches", "val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps",
    "log_every_n_steps", "enable_model_summary", "gradient_clip_val", "gradient_clip_algorithm",
    "deterministic", "benchmark", "inference_mode", "profiler", "detect_anomaly",
    "enable_autolog_hparams",
}  # fmt: skip


@pytest.fixture(scope="module")
def base():
    return quiet_digits("runs")


def prepared(base, name, value):
    """The prepared configuration with an argument, whose value is a text of YAML."""
    cfg = OmegaConf.create(OmegaConf.to_container(base))
    cfg[name] = yaml.safe_load(value)
    return prepare(cfg)


def test_every_argument_is_decided():
    """Lightning's next version may have more."""
    decided = OBEYED | set(REFUSED) | set(Configuration.model_fields)
    assert set(ARGUMENTS) - {"self"} <= decided
    assert not OBEYED & set(REFUSED)


BAD = {
    "enable_checkpointing": ("false", "checkpoint.enabled=False"),
    "logger": ("false", "wandb.enabled"),
    "callbacks": ("[x]", "pretrain"),
    "plugins": ("[x]", "leave it out"),
    "default_root_dir": ("/elsewhere", "checkpoint.dir"),
    "use_distributed_sampler": ("true", "leave it out"),
    "barebones": ("true", "bench step"),
    "overfit_batches": ("2", "data.fraction"),
    "reload_dataloaders_every_n_epochs": ("1", "leave it out"),
    "limit_test_batches": ("3", "leave it out"),
    "limit_predict_batches": ("3", "leave it out"),
    "model_registry": ("there", "leave it out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_run_cannot_obey_is_refused_with_the_right_key(name, base):
    value, instead = BAD[name]
    with pytest.raises(ConfigError, match=f"^{name}: .*cannot be obeyed: .*{instead}"):
        prepared(base, name, value)
    for harmless in (*REFUSED[name][0], "null"):
        prepared(base, name, harmless)


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ("max_steps=0", "max_steps"),
        ("max_steps=abc", "max_steps"),
        ("limit_train_batches=0", "limit_train_batches"),
        ("limit_train_batches=1.5", "trainer"),
        ("limit_train_batches=abc", "limit_train_batches"),
        ("max_time=abc", "trainer"),
        ("gradient_clip_algorithm=foo", "trainer"),
        ("gradient_clip_val=abc", "gradient_clip_val"),
        ("gradient_clip_val=-1", "gradient_clip_val"),
        ("check_val_every_n_epoch=0", "check_val_every_n_epoch"),
        ("val_check_interval=abc", "trainer"),
        ("val_check_interval=0", "val_check_interval"),
        ("val_check_interval=-1", "val_check_interval"),
        ("val_check_interval=true", "val_check_interval"),
        ("fast_dev_run=-1", "trainer"),
        ("profiler=foo", "trainer"),
        ("deterministic=abc", "deterministic"),
        ("detect_anomaly=5", "detect_anomaly"),
        ("min_epochs=abc", "min_epochs"),
        ("min_epochs=9", "min_epochs"),
    ],
)
def test_a_bad_value_is_one_line(given, key, base, tmp_path):
    with pytest.raises(ConfigError, match=f"^{key}: ") as caught:
        cfg = prepared(base, *given.split("="))
        make_trainer(cfg, tmp_path, [], Start())
    assert "\n" not in str(caught.value)


def test_what_is_given_reaches_the_trainer(tmp_path):
    given = ["+gradient_clip_val=0.5", "+val_check_interval=2", "+check_val_every_n_epoch=null",
             "+num_sanity_val_steps=1", "+benchmark=null", "+max_steps=null"]  # fmt: skip
    trainer = make_trainer(prepare(quiet_digits(tmp_path, *given)), tmp_path, [], Start())
    assert trainer.gradient_clip_val == 0.5 and trainer.check_val_every_n_epoch is None
    assert trainer.num_sanity_val_steps == 1 and trainer.val_check_interval == 2
