"""A LightningModule with the mixin trains as a plain loop with ``balance`` does."""

import subprocess
import sys

import pytest
import pytorch_lightning
import torch
from lightning import pytorch as lightning
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from grap_solo import BalanceMixin, ConfigError, GraP, balance, build_weighting

TERMS = ["reconstruction", "sparsity"]
EPOCHS, BATCHES = 3, 4


def loader():
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(8 * BATCHES, 6), torch.randint(0, 3, (8 * BATCHES,)))
    return DataLoader(data, batch_size=8)


def make_class(base):
    class Autoencoder(BalanceMixin, base):
        def __init__(self, **weighting):
            super().__init__()
            torch.manual_seed(0)
            self.backbone, self.decoder = nn.Linear(6, 4), nn.Linear(4, 6)
            self.probe = nn.Linear(4, 3)
            self.weighting = build_weighting({"name": "grap", **weighting}, TERMS)
            self.seen = []

        def terms(self, z, x):
            return {"reconstruction": mse_loss(self.decoder(z), x), "sparsity": z.abs().mean()}

        def training_step(self, batch, batch_idx):
            x, y = batch
            loss = self.balance_loss(
                self.backbone(x),
                lambda z: self.terms(z, x),
                lambda z: cross_entropy(self.probe(z), y),
            )
            self.seen.append((self.last_step.weights, self.weighting.training))
            return loss

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            halve = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
            return {"optimizer": optimizer, "lr_scheduler": halve}

    return Autoencoder


Autoencoder = make_class(lightning.LightningModule)


def fit(module, tmp_path, library=lightning, checkpoint=None, **kwargs):
    save = library.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    given = {"max_epochs": EPOCHS, "logger": False, "enable_model_summary": False}
    given |= {"accelerator": "cpu", "enable_progress_bar": False, "callbacks": [save]}
    trainer = library.Trainer(**given | kwargs)
    trainer.fit(module, loader(), ckpt_path=checkpoint)
    return trainer


@pytest.mark.parametrize("library", [lightning, pytorch_lightning], ids=["lightning", "pl"])
def test_a_module_trains_as_a_plain_loop_does(library, tmp_path):
    module = make_class(library.LightningModule)()
    trainer = fit(module, tmp_path, library)
    twin = Autoencoder()
    twin.weighting.set_total_steps(EPOCHS * BATCHES)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for epoch in range(EPOCHS):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.5**epoch
        for x, y in loader():
            step = balance(
                twin.backbone(x),
                lambda z, x=x: twin.terms(z, x),
                lambda z, y=y: cross_entropy(twin.probe(z), y),
                twin.weighting,
            )
            optimizer.zero_grad()
            step.loss.backward()
            optimizer.step()
    for name, value in module.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name
    assert torch.equal(module.last_step.weights, step.weights)
    logged = trainer.callback_metrics
    assert logged["weight/sparsity"] == step.weights[1]
    assert logged["loss/reconstruction"] == step.losses["reconstruction"]
    assert logged["loss/downstream"] == step.downstream
    assert logged["alignment"] == step.alignment


@pytest.mark.parametrize("rule", [{}, {"warmup_epochs": 1}, {"name": "dwa"}], ids=str)
@pytest.mark.parametrize("epoch", range(EPOCHS - 1))
def test_a_resumed_module_ends_as_an_uninterrupted_one(rule, epoch, tmp_path):
    whole, resumed = Autoencoder(**rule), Autoencoder(**rule)
    fit(whole, tmp_path)
    fit(resumed, tmp_path / "resumed", checkpoint=tmp_path / f"epoch={epoch}.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert whole.last_step.weights.tolist() != [1, 1]  # DWA's move once two epochs have ended.


def test_the_weights_are_held_in_the_warmup_epochs(tmp_path):
    module = Autoencoder(warmup_epochs=2)
    fit(module, tmp_path)
    assert [training for _, training in module.seen] == [False] * 2 * BATCHES + [True] * BATCHES


@pytest.mark.parametrize("schedule", ["constant", "optimizer"])
def test_the_weights_follow_the_optimisers_schedule_if_asked(schedule, tmp_path):
    module = Autoencoder(lr_schedule=schedule)
    fit(module, tmp_path)
    assert module.weighting.lr_factor == (1.0 if schedule == "constant" else 0.25)


def test_accumulated_batches_count_as_steps_of_the_weights(tmp_path):
    module = Autoencoder(lr_per_run=1.0)
    fit(module, tmp_path, accumulate_grad_batches=2)
    assert module.weighting.lr == 1.0 / (EPOCHS * BATCHES)


def test_hooks_of_the_module_are_called_too(tmp_path):
    class Base(lightning.LightningModule):
        called = 0

        def on_train_start(self):
            self.called += 1

        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None  # Ends the epoch after two batches.

    module = make_class(Base)()
    fit(module, tmp_path)
    assert module.called == 1 and len(module.seen) == 2 * EPOCHS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda module: setattr(module, "weighting", None), "Autoencoder.weighting: set one"),
        (
            lambda module: setattr(module, "weighting", build_weighting({"name": "famo"}, TERMS)),
            "weighting: FAMO needs each batch's losses again",
        ),
    ],
    ids=["none", "famo"],
)
def test_a_weighting_that_cannot_work_is_refused(change, message, tmp_path):
    module = Autoencoder()
    change(module)
    with pytest.raises(ConfigError, match=message):
        fit(module, tmp_path)


def test_the_mixin_needs_no_lightning():
    code = "import sys; from grap_solo import BalanceMixin; print('lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_weighting_is_a_submodule_of_the_checkpoint(tmp_path):
    module = Autoencoder()
    fit(module, tmp_path)
    saved = torch.load(tmp_path / f"epoch={EPOCHS - 1}.ckpt", weights_only=False)["state_dict"]
    assert isinstance(module.weighting, GraP)
    assert torch.equal(saved["weighting.weights"], module.weighting.weights)
    assert saved["weighting.updates"] == EPOCHS * BATCHES
