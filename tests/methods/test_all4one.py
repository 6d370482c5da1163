"""The exposed All4One by itself: its terms, its queue, its options, and what labels may reach."""

import pytest
import torch
import torch.nn.functional as F
from helpers import all4one_config, image_batch, take_step
from omegaconf import OmegaConf

from grap_solo.methods import GrapAll4One
from grap_solo.methods.losses import correlation_losses, probe_loss

# The trainer is not there when a step is called by itself.
pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")


def build(seed=0, **changes):
    """A float64 method without dropout, on a small backbone and 32x32 images."""
    base = {"backbone": {"name": "test_resnet"}, "weighting": {"name": "grap"}}
    cfg = OmegaConf.merge(all4one_config(**base), OmegaConf.create(changes))
    torch.manual_seed(seed)
    model = GrapAll4One(cfg).double().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, torch.nn.MultiheadAttention):
            module.dropout = 0.0
    model.weighting.set_total_steps(8)  # There is no trainer that knows it.
    return model


def doubled(batch):
    index, views, labels = batch
    return [index, [view.double() for view in views], labels]


def step_gradients(model, batch):
    """The gradients of one step, by parameter name; the model's state is left as it was."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.zero_grad()
    take_step(model, batch)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.load_state_dict(state)
    return gradients


@pytest.mark.parametrize("shared_heads", ["sum", "weights"])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("joined", [False, True])
def test_a_grap_step_is_algorithm_1_on_the_real_terms(joined, separate, shared_heads):
    kwargs = {"join_feature_loss": joined, "separate_projectors": separate}
    weighting = {"name": "grap", "recipe": "alg1", "shared_heads": shared_heads}
    model = build(method_kwargs=kwargs, weighting=weighting)
    # Weights off the start, and a queue and a momentum network that have seen something.
    for seed in range(2):
        take_step(model, doubled(image_batch(seed=seed)))
    model.weighting.weights.copy_(torch.linspace(0.5, 2.0, len(model.weighting.terms)))
    batch = doubled(image_batch(seed=9))
    actual = step_gradients(model, batch)
    effective = model.effective_weights

    # The same by one ordinary backward per term through the undetached embeddings.
    model.shared = None
    feats = [model.multicrop_forward(x)["feats"] for x in batch[1]]
    momentum = [model.momentum_forward(x) for x in batch[1]]
    outputs = {f"momentum_{key}": [m[key] for m in momentum] for key in ("z", "feats")}
    with torch.no_grad():
        targets = model.make_targets(outputs)
    losses = model.compute_terms(model._project(feats), targets)
    by_term = {}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name in model.weighting.terms:
        grads = torch.autograd.grad(
            losses[name], list(trained.values()), retain_graph=True, allow_unused=True
        )
        by_term[name] = {n: g for n, g in zip(trained, grads) if g is not None}
    probe = [probe_loss(model.classifier(f.detach()), batch[2]) for f in feats]
    probe_grads = torch.autograd.grad(sum(probe) / 2, list(model.classifier.parameters()))

    weights = dict(zip(model.weighting.terms, effective))
    for name, gradient in actual.items():
        if name.startswith("classifier"):
            continue
        weighted = name.startswith("backbone") or (
            shared_heads == "weights" and not separate and name.startswith("projector.")
        )
        expected = sum(
            (weights[term] if weighted else 1.0) * grads[name]
            for term, grads in by_term.items()
            if name in grads
        )
        torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-10, msg=name)
    for parameter, expected in zip(("weight", "bias"), probe_grads):
        torch.testing.assert_close(actual[f"classifier.{parameter}"], expected)
    if separate:  # Each term has its own; none gets another's gradient.
        for term in model.projectors:
            others = [g for t, g in by_term.items() if t != term]
            assert all(not any(f"projectors.{term}." in n for n in grads) for grads in others)


def test_joined_feature_is_the_mean_of_the_two_and_the_default_total_is_unchanged():
    separate, joined = build(), build(method_kwargs={"join_feature_loss": True})
    common = {k: v for k, v in separate.state_dict().items() if not k.startswith("weighting.")}
    joined.load_state_dict(common, strict=False)
    totals, steps = [], []
    for model in (separate, joined):
        logged = {}
        model.log_dict = lambda metrics, logged=logged, **kwargs: logged.update(metrics)
        take_step(model, doubled(image_batch(seed=1)))
        totals.append((logged["train_comb_loss"], logged["train_feature_loss"]))
        steps.append(logged)
    torch.testing.assert_close(totals[0], totals[1])
    mean = (steps[0]["train_byol_loss"] + steps[0]["train_barlow_loss"]) / 2
    torch.testing.assert_close(steps[1]["train_feature_loss"], 10 * mean)


def test_the_terms_against_an_independent_reference():
    """Written out from solo-learn's description, sample by sample."""
    model = build(method_kwargs={"queue_size": 12})
    index, views, labels = doubled(image_batch(batch=6))
    queue = model.queue.clone()
    logged = {}
    model.log_dict = lambda metrics, **kwargs: logged.update(metrics)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    take_step(model, [index, views, labels])
    model.load_state_dict(state)
    z = [model.projector(model.backbone(x)) for x in views]
    targets = [
        F.normalize(model.momentum_projector(model.momentum_backbone(x)), dim=1) for x in views
    ]
    order = [(t @ queue.T).argsort(dim=1, descending=True)[:, :5] for t in targets]
    near = [queue[each] for each in order]

    def info_nce(anchors, others, temperature):
        losses = []
        for i, anchor in enumerate(anchors):
            cosines = torch.stack([F.cosine_similarity(anchor, o, dim=0) for o in others])
            losses.append(torch.logsumexp(cosines / temperature, 0) - cosines[i] / temperature)
        return sum(losses) / len(losses)

    def token(sequence):  # Feature d is the position, and the five tokens are the channels.
        encoding = torch.zeros(5, 16, dtype=torch.float64)
        for k in range(5):
            frequency = torch.tensor(1 / 10000 ** ((k - k % 2) / 6), dtype=torch.float32).double()
            angle = torch.arange(16) * frequency
            encoding[k] = angle.sin() if k % 2 == 0 else angle.cos()
        return model.transformer_encoder(sequence + encoding)[:, 0]

    shifted = [torch.cat([model.predictor2(z[v])[:, None], near[v][:, :4]], 1) for v in (0, 1)]
    expected = {
        "nnclr": sum(info_nce(near[v][:, 0], model.predictor(z[1 - v]), 0.2) for v in (0, 1)) / 2,
        "att_nnclr": sum(info_nce(token(near[v]), token(shifted[1 - v]), 0.1) for v in (0, 1)) / 2,
    }
    squares = {"byol": [], "barlow": []}
    for v in (0, 1):
        a, b = F.normalize(targets[v], dim=0), F.normalize(z[1 - v], dim=0)
        for i in range(16):
            for j in range(16):
                c = (a[:, i] * b[:, j]).sum()
                squares["byol" if i == j else "barlow"].append((c - float(i == j)) ** 2)
    expected |= {k: (sum(values) / len(values)).sqrt() for k, values in squares.items()}
    for name, value in expected.items():
        torch.testing.assert_close(logged[f"train_{name}_loss"], value.detach(), msg=name)
    assert logged["train_nn_acc"] == 0  # An empty queue's labels are -1.


def test_correlation_losses_on_known_matrices():
    # Orthonormal features give the identity; the momentum of view 1 meets view 2.
    basis = torch.linalg.qr(torch.randn(12, 4, dtype=torch.float64)).Q
    byol, barlow = correlation_losses([basis, basis], [basis, basis])
    assert byol < 1e-7 and barlow < 1e-7
    byol, barlow = correlation_losses([-basis, -basis], [basis, basis])
    assert byol.item() == pytest.approx(2.0) and barlow < 1e-7
    byol, _ = correlation_losses([basis, -basis], [basis, -basis])
    assert byol.item() == pytest.approx(2.0)
    ones = torch.ones(12, 4, dtype=torch.float64)
    byol, barlow = correlation_losses([ones, ones], [ones, ones])
    assert byol < 1e-7 and barlow.item() == pytest.approx(1.0)


def test_backbone_and_heads_run_once_per_view_and_the_queue_is_searched_once(
    monkeypatch,
):
    model = build()
    calls = {name: 0 for name in ("backbone", "momentum_backbone", "projector", "predictor",
                                  "predictor2", "momentum_projector")}  # fmt: skip
    for name in calls:

        def count(*args, name=name):
            calls[name] += 1

        getattr(model, name).register_forward_hook(count)
    searches = []
    topk = torch.Tensor.topk

    def counted(self, *args, **kwargs):
        searches.append(self.shape)
        return topk(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "topk", counted)
    model.training_step(doubled(image_batch()), 0).backward()
    assert set(calls.values()) == {2}
    assert [shape for shape in searches if shape[1] == 40] == [(16, 40)]


@pytest.mark.parametrize("size", [7, 8, 40, 41])
def test_any_queue_size_and_last_batch(size):
    model = build(method_kwargs={"queue_size": size})
    expected_y = torch.full((size,), -1)
    pointer = 0
    for seed, batch in enumerate([8, 8, 5, 8, 3, 8]):
        index, views, labels = doubled(image_batch(batch=batch, seed=seed))
        take_step(model, [index, views, labels])
        start = max(0, batch - size)
        for label in labels[start:]:
            expected_y[pointer % size] = label
            pointer += 1
        assert torch.equal(model.queue_y, expected_y)
        assert int(model.queue_ptr) == pointer % size
    torch.testing.assert_close(model.queue.norm(dim=1), torch.ones(size, dtype=torch.float64))


def test_labels_cannot_reach_the_backbone_when_the_weights_are_held():
    model = build(weighting={"name": "grap", "warmup_epochs": 1})
    batch = doubled(image_batch(seed=3))
    before = step_gradients(model, batch)
    permuted = [batch[0], batch[1], batch[2][torch.randperm(8)]]
    assert not torch.equal(batch[2], permuted[2])
    after = step_gradients(model, permuted)
    for name in before:
        if not name.startswith("classifier"):
            assert torch.equal(before[name], after[name]), name
    assert not torch.equal(before["classifier.weight"], after["classifier.weight"])


def test_labels_do_reach_the_weights():
    model = build()
    batch = doubled(image_batch(seed=3))
    model.training_step(batch, 0)
    first = model.weighting.weights.clone()
    assert not torch.equal(first, torch.ones(4, dtype=torch.float64))
    other = build()
    other.training_step([batch[0], batch[1], batch[2].flip(0)], 0)
    assert not torch.equal(first, other.weighting.weights)


@pytest.mark.parametrize("classifier", [False, True])
def test_a_batch_without_labels_updates_no_weights_and_is_no_error(classifier):
    model = build(momentum={"classifier": classifier})
    index, views, labels = doubled(image_batch(seed=1))
    start = model.weighting.weights.clone()
    loss = model.training_step([index, views, torch.full_like(labels, -1)], 0)
    loss.backward()
    assert torch.equal(model.weighting.weights, start)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert not model.classifier.weight.grad.any()
    assert model.backbone.conv1[0].weight.grad.any()


def test_unlabelled_samples_are_left_out_of_the_probe():
    logits = torch.randn(6, 3)
    labels = torch.tensor([0, -1, 2, -1, 1, -1])
    kept = labels >= 0
    torch.testing.assert_close(
        probe_loss(logits, labels), F.cross_entropy(logits[kept], labels[kept])
    )
    assert probe_loss(logits, torch.full((6,), -1)) == 0


def test_separate_projectors_are_trained_and_averaged():
    model = build(method_kwargs={"separate_projectors": True})
    assert set(model.projectors) == {"attn_nnclr", "byol", "barlow"}
    assert set(model.momentum_projectors) == {"byol", "barlow"}
    assert not torch.equal(model.projectors["byol"][0].weight, model.projector[0].weight)
    assert torch.equal(
        model.projectors["byol"][0].weight, model.momentum_projectors["byol"][0].weight
    )
    trained = {id(p) for group in model.learnable_params for p in group["params"]}
    assert all(id(p) in trained for p in model.projectors.parameters())
    assert not any(id(p) in trained for p in model.momentum_projectors.parameters())
    assert (
        model.projectors["byol"],
        model.momentum_projectors["byol"],
    ) in model.momentum_pairs
