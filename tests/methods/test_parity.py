"""Every method with its reference weights against solo-learn's own, over both base classes."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from helpers import METHOD_KWARGS, image_batch, method_config, method_over, take_step

pytestmark = [
    pytest.mark.solo_learn,
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(params=METHOD_KWARGS)
def name(request):
    return request.param


@pytest.fixture(params=["own", "solo_learn"])
def method(request, name, monkeypatch):
    return method_over(request.param, monkeypatch, name)


def pair(method, name, **changes):
    """Both models with one state dict."""
    from solo.methods import METHODS

    cfg = method_config(name, **changes)
    torch.manual_seed(0)
    theirs = METHODS[name](copy.deepcopy(cfg))
    torch.manual_seed(1)
    ours = method(copy.deepcopy(cfg))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return theirs.train(), ours.train()


def no_gradient(name):
    """A bias before a batch-norm, or before a term that centres, has no gradient but rounding."""
    last = () if name == "all4one" else (7,)
    keys = {f"projector.{k}.bias" for k in (0, 3, 6, *last)}
    return keys | {"predictor.0.bias", "predictor2.0.bias"}


def assert_close(actual, expected, tolerance, name, floor=1e-12):
    """Within ``tolerance`` of the largest element, or of ``floor`` if that is larger."""
    scale = expected.abs().max().clamp(min=floor)
    error = ((actual - expected).abs().max() / scale).item()
    assert error < tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize(
    ("dataset", "size"),
    [("cifar10", 32), ("imagenet100", 64)],
    ids=["cifar", "imagenet"],
)
@pytest.mark.parametrize("order", [1, -1], ids=["views", "views_swapped"])
def test_loss_and_every_gradient_are_solo_learns(method, name, dataset, size, order):
    classes = 10 if dataset == "cifar10" else 100
    data = {"dataset": dataset, "num_classes": classes}
    theirs, ours = pair(method, name, data=data)
    # A warm momentum network and queue: the first step of a fresh model is a special case.
    for seed in (1, 2):
        index, views, labels = image_batch(size, seed=seed, classes=classes)
        for model in (theirs, ours):
            torch.manual_seed(seed)
            take_step(model, [index, views, labels])
    index, views, labels = image_batch(size, seed=3, classes=classes)
    losses = []
    for model in (theirs, ours):
        torch.manual_seed(7)  # The transformer's dropout.
        model.zero_grad()
        loss = take_step(model, [index, views[::order], labels])
        losses.append(loss.detach())
    assert_close(losses[1], losses[0], 1e-5, "loss")
    expected = dict(theirs.named_parameters())
    largest = max(p.grad.abs().max() for p in expected.values() if p.grad is not None).item()
    compared = 0
    for key, parameter in ours.named_parameters():
        if expected[key].grad is None:
            assert parameter.grad is None or not parameter.grad.any(), key
            continue
        floor = largest if key in no_gradient(name) else 0.0
        assert_close(parameter.grad, expected[key].grad, 1e-5, key, floor)
        compared += 1
    assert compared > (100 if name == "all4one" else 70)
    if name == "all4one":
        for key in ("queue", "queue_y", "queue_ptr", "queue_index"):
            assert torch.equal(getattr(ours, key), getattr(theirs, key)), key


@pytest.mark.parametrize("warmup_epochs", [0, 1, 2])
def test_twenty_steps_under_lars_with_the_schedule_stay_together(
    method, name, tmp_path, warmup_epochs
):
    scheduler = {"name": "warmup_cosine", "warmup_epochs": warmup_epochs}
    # In float64, since the steps of a batch-normed net multiply rounding errors: with a batch of 8
    # by up to 3 each, so that the methods with larger gradients take smaller steps.
    changes = {"scheduler": scheduler, "data": {"dataset": "imagenet100"}}
    if name != "all4one":
        changes["optimizer"] = {"lr": 5e-5}
    theirs, ours = pair(method, name, **changes)
    batches = [image_batch(seed=seed) for seed in range(5)]
    states, rates = [], []
    for model in (theirs, ours):
        torch.manual_seed(3)
        trainer = pl.Trainer(
            max_epochs=4,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            precision="64-true",
        )
        doubled = [
            [index, [view.double() for view in views], labels] for index, views, labels in batches
        ]
        trainer.fit(model, torch.utils.data.DataLoader(doubled, batch_size=None))
        assert trainer.global_step == 20
        states.append(model.state_dict())
        rates.append(sorted({group["lr"] for group in trainer.optimizers[0].param_groups}))
    assert rates[1] == pytest.approx(rates[0], rel=1e-9)
    parameters = dict(theirs.named_parameters())
    start = pair(method, name, **changes)[0].state_dict()
    moved = 0
    for key in parameters:
        floor = 1e-3 if key in no_gradient(name) else 1e-12
        assert_close(states[1][key], states[0][key], 1e-8, key, floor)
        moved += not torch.equal(states[0][key].float(), start[key])
    assert moved > (100 if name == "all4one" else 60)


def test_knn_is_solo_learns(monkeypatch):
    import torchmetrics
    from solo.utils.knn import WeightedKNNClassifier as Theirs

    from grap_solo.evaluation.online import WeightedKNNClassifier as Ours

    # solo-learn's passes an argument that torchmetrics has dropped since.
    start = torchmetrics.Metric.__init__
    monkeypatch.setattr(
        torchmetrics.Metric,
        "__init__",
        lambda self, compute_on_step=None, **kwargs: start(self, **kwargs),
    )
    generator = torch.Generator().manual_seed(0)
    train, test = (
        torch.randn(200, 8, generator=generator),
        torch.randn(60, 8, generator=generator),
    )
    labels = torch.arange(200) % 10
    targets = torch.arange(60) % 10
    train[:, 0] += labels
    test[:, 0] += targets
    for distance in ("cosine", "euclidean"):
        theirs = Theirs(k=20, distance_fx=distance)
        ours = Ours(k=20, distance_fx=distance)
        for each in (theirs, ours):
            each.update(train_features=train, train_targets=labels)
            each.update(test_features=test, test_targets=targets)
        expected, actual = theirs.compute(), ours.compute()
        assert actual == pytest.approx(expected, abs=1e-4)
        assert 20 < actual[0] < 100
