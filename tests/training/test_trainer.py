"""What Lightning and torch do around a step works here as with any module."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from helpers import quiet_digits, take_step
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from torch import nn
from torch.nn import functional as F

from grap_solo import ConfigError, balance, build_weighting
from grap_solo.experiments.counting import count_operators
from grap_solo.experiments.timing import random_batch
from grap_solo.methods import GrapAll4One
from grap_solo.methods.modules import frozen_statistics
from grap_solo.training.config import prepare
from grap_solo.training.run import pretrain

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def model_of(*overrides, rule=None):
    dtype = torch.float64
    chosen = [f"+weighting={{name: {rule}}}", "method=grap_all4one"] if rule else []
    file = "all4one" if rule else "grap"
    cfg = prepare(quiet_digits("runs", *chosen, *overrides, file=file))
    cfg.data.num_classes = 10
    torch.manual_seed(0)
    model = GrapAll4One(cfg).to(dtype).train()
    if not cfg.performance.disable_channel_last:
        model = model.to(memory_format=torch.channels_last)
    model.log = model.log_dict = lambda *args, **kwargs: None
    model.weighting.set_total_steps(8)
    return model


def batch_of(model, dtype=torch.float64):
    indexes, views, labels = random_batch(model.cfg)
    return [indexes, [each.to(dtype) for each in views], labels]


def gradients(model):
    """One step's, by name."""
    torch.manual_seed(1)
    model.training_step(batch_of(model), 0).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert set(found) == set(expected)
    # Of all together, since a bias in front of a batch-norm has none of its own.
    size = torch.cat([each.flatten() for each in expected.values()]).norm()
    for name, each in expected.items():
        assert (found[name] - each).norm() < 1e-9 * size, name


@pytest.mark.parametrize(
    "change", ["+performance.disable_channel_last=true", "+performance.compile=true"]
)
def test_channels_last_and_compiled_networks_change_no_gradient(change, monkeypatch):
    """Without the compiler of C++ and its minute: what it is given is the same."""
    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda each: original(each, backend="aot_eager"))
    expected, model = gradients(model_of()), model_of(change)
    assert_same(gradients(model), expected)
    assert list(model.state_dict()) == list(model_of().state_dict())
    if "compile" in change:
        compiled = [name for name, each in model.named_modules() if each._compiled_call_impl]
        assert compiled == ["backbone", "momentum_backbone", "momentum_projector"]


@pytest.fixture
def heads():
    """An embedding, two terms and a probe whose heads torch.compile has compiled."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).double()
    probe, labels = nn.Linear(8, 3).double(), torch.arange(16) % 3

    def embedding():
        return torch.linspace(-1, 1, 128, dtype=torch.float64).view(16, 8).sin().requires_grad_()

    def step(head):
        z = embedding()
        found = balance(
            z,
            lambda z: {"a": head(z).square().mean(), "b": head(z).tanh().sum()},
            lambda z: F.cross_entropy(probe(z), labels),
            build_weighting({"name": "grap", "recipe": "alg1"}, ["a", "b"]).double(),
        )
        found.loss.backward()
        return z.grad

    yield head, step, embedding
    torch._dynamo.reset()


def test_a_compiled_head_is_refused_or_works(heads):
    head, step, embedding = heads
    compiled = copy.deepcopy(head)
    compiled.compile(backend="aot_eager")
    compiled(embedding()).sum().backward()  # From here on torch reuses its saved tensors.
    with pytest.raises(ConfigError, match="terms: a head that torch.compile has compiled"):
        step(compiled)
    torch._dynamo.reset()
    # Not monkeypatch, whose undo would hide the key from torch for the rest of the process.
    with torch._functorch.config.patch(donated_buffer=False):
        compiled(embedding()).sum().backward()
        compiled.zero_grad()
        torch.testing.assert_close(step(compiled), step(head), rtol=1e-9, atol=1e-12)


class Watch(Callback):
    """What the optimiser has got, and how often."""

    def __init__(self):
        self.norms, self.gradients = [], []

    def on_train_start(self, trainer, module):
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.look(module))

    def look(self, module):
        found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        self.gradients.append({name: each.clone() for name, each in found.items()})
        self.norms.append(torch.cat([each.flatten() for each in found.values()]).norm().item())


def test_gradient_clipping_bounds_what_the_optimiser_gets(tmp_path):
    free, clipped = Watch(), Watch()
    pretrain(quiet_digits(tmp_path / "free"), [free])
    pretrain(quiet_digits(tmp_path / "clipped", "+gradient_clip_val=0.01"), [clipped])
    assert free.norms[0] > 0.1 and max(clipped.norms) < 0.0101
    first = clipped.gradients[0]
    for name, each in free.gradients[0].items():  # The same direction.
        torch.testing.assert_close(
            first[name] / clipped.norms[0], each / free.norms[0], rtol=1e-3, atol=1e-6
        )


def test_accumulated_gradients_are_the_mean_of_the_steps(tmp_path):
    """With a rule that remembers nothing of the step before."""
    model = model_of("optimizer.batch_size=32", rule="mgda")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    batches = []
    for seed in range(2):
        torch.manual_seed(seed)
        batches.append([*batch_of(model)[:1], [torch.randn(32, 3, 8, 8).double() for _ in "ab"],
                        torch.arange(32) % 10])  # fmt: skip
    start, watch = copy.deepcopy(model.state_dict()), Watch()
    settings = dict(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1,
                    enable_progress_bar=False, default_root_dir=tmp_path,
                    enable_model_summary=False)  # fmt: skip
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer = pl.Trainer(**settings, accumulate_grad_batches=2, callbacks=[watch])
    trainer.fit(model, loader)
    assert trainer.global_step == len(watch.gradients) == 1
    model.load_state_dict(start)
    model.zero_grad()
    for number, batch in enumerate(batches):
        (model.training_step(batch, number) / 2).backward()
        model.on_after_backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same(watch.gradients[0], expected)


def test_an_average_of_the_parameters_trains_beside_them(tmp_path):
    """Lightning's callback ends with the average in the model, queue and weighting included."""
    plain = pretrain(quiet_digits(tmp_path / "plain")).model.state_dict()
    average = EMAWeightAveraging(decay=0.9)
    averaged = pretrain(quiet_digits(tmp_path / "averaged"), [average]).model.state_dict()
    name = "backbone.conv1.0.weight"
    start = GrapAll4One(_prepared(tmp_path)).state_dict()[name]
    assert averaged[name].isfinite().all() and not torch.equal(averaged[name], plain[name])
    assert (averaged[name] - start).norm() < (plain[name] - start).norm()


def _prepared(directory):
    cfg = prepare(quiet_digits(directory))
    cfg.data.num_classes = 10
    pl.seed_everything(cfg.seed, verbose=False)
    return cfg


def test_synchronised_batch_norms_keep_names_and_can_be_frozen():
    """The module that Lightning makes of ours for several GPUs."""
    model = model_of()
    names = list(model.state_dict())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert list(converted.state_dict()) == names
    norms = [each for each in converted.modules() if isinstance(each, nn.SyncBatchNorm)]
    assert len(norms) > 30
    with frozen_statistics(converted):
        assert all(each.momentum == 0 for each in norms)
    assert all(each.momentum == 0.1 for each in norms)


@pytest.mark.parametrize("rule", ["grap", "fixed", "equal", "gradnorm", "dwa", "uncertainty"])
def test_a_step_waits_for_the_device_once(rule):
    """For whether it is finite; with LARS and the momentum update, and with the queue's."""
    model = model_of("scheduler.name=none", rule=rule)
    optimizer, batch = model.configure_optimizers(), batch_of(model)

    def step():
        take_step(model, batch, 1)
        optimizer.step()
        for pair in model.momentum_pairs:
            model.momentum_updater.update(*pair)

    step()
    assert count_operators(step).waits == ["tolist"]
