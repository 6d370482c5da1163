"""The downstream heads: their losses and measures, in one process and in two, and GraP's target."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import image_batch, in_two_processes, method_config, take_step
from sklearn.metrics import average_precision_score, mean_absolute_error, r2_score
from torch.nn import functional as F

from grap_solo import ConfigError
from grap_solo.methods import METHODS
from grap_solo.methods.downstream import DownstreamHeads

NAN = float("nan")
ENTRIES = {
    "type": {"task": "classification", "classes": 3, "weight": 1.0},  # Also an attribute's name.
    "size": {"task": "regression", "mean": 10.0, "sd": 4.0, "weight": 0.5},
    "tags": {"task": "multi_label", "columns": ["red", "round"], "weight": 2.0},
}
TARGETS = {
    "type": torch.tensor([0, 1, -1, 2, 0, -1]),
    "size": torch.tensor([10.0, NAN, 18.0, 2.0, NAN, 7.0]),
    "tags": torch.tensor([[1, 0], [NAN, 1], [NAN, NAN], [0, 0], [1, NAN], [0, 1.0]]),
}


def heads(entries=ENTRIES):
    torch.manual_seed(0)
    return DownstreamHeads(5, entries)


def views(count=6):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(count, 5, generator=generator) for _ in range(2)]


def none_known():
    return {"type": torch.full((6,), -1), "size": torch.full((6,), NAN),
            "tags": torch.full((6, 2), NAN)}  # fmt: skip


def test_the_loss_is_the_weighted_sum_over_the_known_targets():
    model, expected = heads(), torch.zeros(())
    for view in views():
        known = TARGETS["type"] != -1
        expected += F.cross_entropy(model.head("type")(view)[known], TARGETS["type"][known])
        known = ~TARGETS["size"].isnan()
        wanted = (TARGETS["size"][known] - 10) / 4
        expected += 0.5 * F.mse_loss(model.head("size")(view)[known, 0], wanted)
        known = ~TARGETS["tags"].isnan()
        outputs = model.head("tags")(view)[known]
        expected += 2 * F.binary_cross_entropy_with_logits(outputs, TARGETS["tags"][known])
    torch.testing.assert_close(model.loss(views(), TARGETS), expected / 2)


@pytest.mark.parametrize("name", ENTRIES)
def test_a_head_without_a_known_target_counts_0_and_gets_no_gradient(name):
    model = heads()
    model.loss(views(), {**TARGETS, name: none_known()[name]}).backward()
    assert model.last_losses[name] == 0
    for each in ENTRIES:
        gradient = model.head(each).weight.grad
        assert gradient is not None and gradient.isfinite().all()  # Or DDP would wait for it.
        assert gradient.any() == (each != name)
    assert model.loss(views(), none_known()) == 0


def test_the_order_of_the_entries_does_not_reorder_the_parameters():
    turned = heads(dict(reversed(ENTRIES.items())))
    assert [*turned.state_dict()] == [*heads().state_dict()]
    assert turned.names == ("tags", "size", "type")
    torch.testing.assert_close(turned.loss(views(), TARGETS), heads().loss(views(), TARGETS))


def measured(model, slices):
    (view, _), found = views(), {}
    for part in slices:
        model.keep(view[part], {name: each[part] for name, each in TARGETS.items()})
    found = model.measure()
    assert not model.head("type").kept.kept  # Forgotten.
    return found


@torch.no_grad()
def test_measures_are_those_of_scikit_learn_over_all_batches():
    model, (view, _) = heads(), views()
    found = measured(model, [slice(0, 4), slice(4, 6)])
    known = TARGETS["type"] != -1
    hits = model.head("type")(view).argmax(1)[known] == TARGETS["type"][known]
    assert found["val_type_acc1"] == pytest.approx(100 * hits.float().mean().item())
    assert found["val_acc1"] == found["val_type_acc1"] and found["val_acc5"] == 100
    known = ~TARGETS["size"].isnan()
    outputs = 10 + 4 * model.head("size")(view)[known, 0]
    assert found["val_size_r2"] == pytest.approx(
        r2_score(TARGETS["size"][known], outputs), rel=1e-5
    )
    expected = mean_absolute_error(TARGETS["size"][known], outputs)
    assert found["val_size_mae"] == pytest.approx(expected, rel=1e-5)
    precisions = []
    for k in range(2):
        known = ~TARGETS["tags"][:, k].isnan()
        outputs = model.head("tags")(view)[known, k]
        precisions.append(average_precision_score(TARGETS["tags"][known, k], outputs))
    assert found["val_tags_map"] == pytest.approx(100 * np.mean(precisions))


@torch.no_grad()
def test_a_measure_without_a_value_is_left_out():
    model = heads()
    some = none_known()
    some["size"][0], some["tags"][0] = 3.0, torch.tensor([NAN, 0.0])
    model.keep(views()[0], some)
    assert set(model.measure()) == {"val_size_loss", "val_size_mae", "val_tags_loss"}


# ---- two processes -------------------------------------------------------------------------------


def loss_and_gradients(part):
    model = heads()
    leaves = [each[part].clone().requires_grad_() for each in views()]
    loss = model.loss(leaves, {name: each[part] for name, each in TARGETS.items()})
    loss.backward()
    gradients = torch.cat([each.grad.flatten() for each in model.parameters()])
    embedding = torch.cat([each.grad for each in leaves], 1)
    return loss.detach(), gradients, embedding


def process(path):
    dist.init_process_group("gloo")
    # The first knows 2 of 4 classes, 1 of 4 sizes, 3 of 8 tags: a mean of means would differ.
    part = slice(0, 2) if dist.get_rank() == 0 else slice(2, 6)
    loss, gradients, embedding = loss_and_gradients(part)
    for each in (loss, gradients):  # As DDP averages, and as metrics are.
        dist.all_reduce(each)
    with torch.no_grad():
        found = measured(heads(), [part])
    torch.save((loss / 2, gradients / 2, embedding / 2, found), f"{path}/{dist.get_rank()}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_loss_gradients_and_measures_of_the_joined_batch(tmp_path):
    """Of unequal parts, in which other shares of the targets are known."""
    in_two_processes(process, str(tmp_path))
    loss, gradients, embedding = loss_and_gradients(slice(0, 6))
    with torch.no_grad():
        expected = measured(heads(), [slice(0, 6)])
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for each in found:
        torch.testing.assert_close(each[0], loss)
        torch.testing.assert_close(each[1], gradients)
        assert each[3] == pytest.approx(expected)
    torch.testing.assert_close(torch.cat([each[2] for each in found]), embedding)


# ---- in a method ---------------------------------------------------------------------------------


def random_targets(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"type": torch.randint(-1, 3, (8,), generator=generator),
            "size": 10 + 4 * torch.randn(8, generator=generator),
            "tags": torch.randint(0, 2, (8, 2), generator=generator).float()}  # fmt: skip


def build(method, monkeypatch, entries=ENTRIES, rule="grap"):
    torch.manual_seed(0)
    cfg = method_config(method, downstream=entries, weighting={"name": rule})
    cfg.method = f"grap_{method}"
    model = METHODS[method](cfg).train()
    model.weighting.set_total_steps(4)
    logged = {}
    monkeypatch.setattr(model, "log", lambda *args, **kwargs: None)
    monkeypatch.setattr(model, "log_dict", lambda found, **kwargs: logged.update(found))
    return model, logged


@pytest.mark.parametrize("method", METHODS)
def test_grap_aligns_with_the_gradient_of_the_weighted_sum(method, monkeypatch):
    model, logged = build(method, monkeypatch)
    indexes, images, _ = image_batch()
    steps = []
    balance = model.balance
    monkeypatch.setattr(model, "balance", lambda *args: steps.append(balance(*args)) or steps[-1])
    take_step(model, [indexes, images, random_targets()])
    (step,) = steps
    assert logged["downstream/size"] > 0 and "train_acc1" in logged
    total = sum(ENTRIES[name]["weight"] * logged[f"downstream/{name}"] for name in ENTRIES)
    torch.testing.assert_close(step.downstream, total)
    products = [
        sum((a * b).sum() for a, b in zip(row, step.downstream_gradients, strict=True))
        for row in step.gradients
    ]
    torch.testing.assert_close(step.statistics.products, torch.stack(products))
    for name in ENTRIES:
        assert model.classifier.head(name).weight.grad.any()
    groups = model.learnable_params
    (group,) = [each for each in groups if each.get("name") == "classifier"]
    assert len(group["params"]) == 2 * len(ENTRIES) and group["lr"] == model.classifier_lr


def test_without_a_head_that_classifies_no_accuracy_is_logged(monkeypatch):
    entries = {"size": ENTRIES["size"]}
    torch.manual_seed(0)
    model = METHODS["vicreg"](method_config("vicreg", downstream=entries)).train()
    logged = {}
    # Below the method's own log_dict, which leaves them out.
    monkeypatch.setattr(
        "lightning.pytorch.LightningModule.log_dict",
        lambda self, found, **kwargs: logged.update(found),
    )
    monkeypatch.setattr(model, "log", lambda *args, **kwargs: None)
    take_step(model, [*image_batch()[:2], random_targets()])
    assert "downstream/size" in logged and not {"train_acc1", "train_class_loss"} & set(logged)


def test_labels_alone_are_refused_as_solo_learns_scripts_give_them(monkeypatch):
    unfilled = {"type": {"task": "classification", "weight": 1.0}}
    with pytest.raises(ConfigError, match="^downstream: solo-learn's scripts read class labels"):
        METHODS["vicreg"](method_config("vicreg", downstream=unfilled))
    model, _ = build("vicreg", monkeypatch, {"tags": ENTRIES["tags"]})
    with pytest.raises(ConfigError, match="^downstream: solo-learn's scripts read class labels"):
        take_step(model, image_batch())
