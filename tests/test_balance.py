"""The surrogate against one autograd call per term, in float64."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grap_solo import ConfigError, Equal, Fixed, GraP, SharedHead, balance, build_weighting


class Net(nn.Module):
    """A small backbone, K heads of different shapes, a probe, and a batch for it."""

    def __init__(self, terms: int, views: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5))
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(5, 3 + k), nn.Tanh(), nn.Linear(3 + k, 2)) for k in range(terms)
        )
        self.probe = nn.Linear(5, 3)
        self.double()
        self.names = [f"term{k}" for k in range(terms)]
        self.images = [torch.randn(7, 6, dtype=torch.float64) for _ in range(views)]
        self.targets = [torch.randn(7, 2, dtype=torch.float64) for _ in range(terms)]
        self.labels = torch.randint(0, 3, (7,))

    def embed(self) -> list[torch.Tensor]:
        return [self.backbone(x) for x in self.images]

    def terms(self, *z: torch.Tensor) -> dict[str, torch.Tensor]:
        # The k-th term weighs the views differently and has its own scale.
        return {
            name: 10.0 ** (k % 3 - 1)
            * sum((1 + k * v) * F.mse_loss(head(each), target) for v, each in enumerate(z))
            for k, (name, head, target) in enumerate(zip(self.names, self.heads, self.targets))
        }

    def downstream(self, *z: torch.Tensor) -> torch.Tensor:
        return sum(F.cross_entropy(self.probe(each), self.labels) for each in z) / len(z)


def gradients(loss, module, **kwargs):
    return torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, **kwargs)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 4, 18])
@pytest.mark.parametrize("scale", ["reference", "unit", 3.5])
def test_gradients_are_those_of_algorithm_1(count, views, scale):
    net = Net(count, views)
    reference = {name: 0.5 + k for k, name in enumerate(net.names)}
    weighting = GraP(net.names, reference, scale=scale, recipe="alg1").double()
    weighting.weights.copy_(torch.rand(count) + 0.1)
    start = weighting.weights.clone()

    # What Alg. 1 asks for, one autograd call per term, through the undetached net.
    z = net.embed()
    losses = net.terms(*z)
    rows = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(each, z, retain_graph=True)])
            for each in losses.values()
        ]
    )
    w_ref = torch.tensor(list(reference.values()), dtype=torch.float64)
    norm = {"reference": (w_ref @ rows).norm(), "unit": torch.tensor(1.0)}.get(scale, scale)
    expected_weights = start * norm / (start @ rows).norm()
    composite = sum(w * each for w, each in zip(expected_weights, losses.values()))
    backbone = gradients(composite, net.backbone)
    heads = [gradients(each, h) for each, h in zip(losses.values(), net.heads)]
    probe = gradients(net.downstream(*[each.detach() for each in z]), net.probe)

    views_in = net.embed()
    step = balance(views_in if views > 1 else views_in[0], net.terms, net.downstream, weighting)
    step.loss.backward()

    torch.testing.assert_close(step.weights, expected_weights)
    torch.testing.assert_close([p.grad for p in net.backbone.parameters()], list(backbone))
    for head, expected in zip(net.heads, heads):
        torch.testing.assert_close([p.grad for p in head.parameters()], list(expected))
    torch.testing.assert_close([p.grad for p in net.probe.parameters()], list(probe))
    torch.testing.assert_close(step.statistics.gramian, rows @ rows.T)


@pytest.mark.parametrize("count", [1, 4])
def test_statistics_and_alignment(count):
    net = Net(count, 2)
    weighting = GraP(net.names, recipe="alg1").double()
    z = net.embed()
    losses = net.terms(*z)
    rows = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(each, z, retain_graph=True)])
            for each in losses.values()
        ]
    )
    down = torch.cat([g.flatten() for g in torch.autograd.grad(net.downstream(*z), z)])
    step = balance(net.embed(), net.terms, net.downstream, weighting)
    torch.testing.assert_close(step.statistics.products, rows @ down)
    torch.testing.assert_close(step.statistics.downstream_norm, down.norm())
    cosine = F.cosine_similarity(rows.sum(0), down, dim=0)
    torch.testing.assert_close(step.alignment, cosine)
    assert {k: v.item() for k, v in step.losses.items()} == pytest.approx(
        {k: v.item() for k, v in losses.items()}
    )


@pytest.mark.parametrize("make", [Fixed, Equal])
def test_plain_path_is_the_weighted_sum_and_computes_no_embedding_gradient(make, monkeypatch):
    net = Net(3, 2)
    weighting = make(net.names, {"term0": 0.5, "term1": 2.0, "term2": 0.0})
    values = [0.5, 2.0, 0.0] if make is Fixed else [1.0, 1.0, 1.0]
    losses = net.terms(*net.embed())
    total = sum(w * each for w, each in zip(values, losses.values()))
    expected = [gradients(total, m) for m in (net.backbone, net.heads)]

    def forbidden(*args, **kwargs):
        raise AssertionError("the plain path took an inner gradient")

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", forbidden)
        step = balance(net.embed(), net.terms, net.downstream, weighting)
    step.loss.backward()
    torch.testing.assert_close([p.grad for p in net.backbone.parameters()], list(expected[0]))
    torch.testing.assert_close([p.grad for p in net.heads.parameters()], list(expected[1]))
    assert step.statistics.gramian is None and step.alignment is None


@pytest.mark.parametrize(
    "weighting", [Fixed(["term0", "term1"]), GraP(["term0", "term1"], recipe="alg1").eval()]
)
def test_labels_reach_the_backbone_through_the_weights_alone(weighting):
    net = Net(2, 2)

    def backbone_gradients():
        net.zero_grad()
        balance(net.embed(), net.terms, net.downstream, weighting).loss.backward()
        return [p.grad.clone() for p in net.backbone.parameters()]

    before = backbone_gradients()
    probe = net.probe.weight.grad.clone()
    net.labels = net.labels.roll(1)
    after = backbone_gradients()
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert not torch.equal(probe, net.probe.weight.grad)


@pytest.mark.parametrize("heads", ["unweighted", "reference", "weighted"])
@pytest.mark.parametrize("mode", ["sum", "weights", "aligned_mtl"])
def test_a_shared_head_gets_the_sum_the_weighted_sum_or_the_aligned_sum(mode, heads):
    net = Net(3, 2)
    projector = nn.Linear(5, 5).double()
    reference = {"term0": 0.5, "term1": 2.0, "term2": 1.0}
    weighting = GraP(net.names, reference, shared_heads=mode, heads=heads, recipe="alg1").double()
    shared = SharedHead(net.names, projector.parameters())

    def terms(*z, route=shared):
        out = [projector(each) for each in z]
        losses = {}
        for k, name in enumerate(net.names):
            seen = out if route is None else [route(each, name) for each in out]
            losses[name] = sum(F.mse_loss(net.heads[k](each), net.targets[k]) for each in seen)
        return losses

    step = balance(net.embed(), terms, net.downstream, weighting, shared)
    step.loss.backward()
    losses = terms(*[each.detach() for each in net.embed()], route=None)
    head_weights = weighting.head_weights(step.weights)
    if mode == "aligned_mtl":
        rows = [gradients(each, projector) for each in losses.values()]
        matrix = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
        left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
        aligned = (sizes.min() * left @ right).sum(0)
        expected = aligned.split([p.numel() for p in projector.parameters()])
        expected = [e.view_as(p) for e, p in zip(expected, projector.parameters())]
    else:
        weights = head_weights if mode == "sum" else step.weights
        expected = gradients(sum(w * each for w, each in zip(weights, losses.values())), projector)
    torch.testing.assert_close([p.grad for p in projector.parameters()], list(expected))
    # The Gramian is of the unweighted terms, also on the second step, after scales were set.
    again = balance(net.embed(), terms, net.downstream, weighting.eval(), shared)
    torch.testing.assert_close(again.statistics.gramian, step.statistics.gramian)
    for k, name in enumerate(net.names):
        own = gradients(head_weights[k] * losses[name], net.heads[k])
        torch.testing.assert_close([p.grad for p in net.heads[k].parameters()], list(own))


def test_a_constant_term_has_a_zero_gradient():
    net = Net(2, 1)

    def terms(z):
        return {**net.terms(z), "term1": torch.tensor(3.0, dtype=torch.float64)}

    step = balance(net.embed()[0], terms, net.downstream, GraP(net.names, recipe="alg1").double())
    step.loss.backward()
    assert step.statistics.gramian[1].abs().sum() == 0
    assert step.weights.isfinite().all()


def test_wrong_term_names_are_named():
    net = Net(2, 1)
    with pytest.raises(ConfigError, match="recon.*term0, term1"):
        balance(net.embed()[0], net.terms, net.downstream, GraP(["recon", "term1"], recipe="alg1"))


# ---- what is refused -----------------------------------------------------------------------------


def changed_terms(net, change):
    return lambda *z: {**net.terms(*z), **change(*z)}


@pytest.mark.parametrize("make", [GraP, Fixed])
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda z: z.square().mean().view(1), r"shape \(1,\): take its mean or sum"),
        (lambda z: z.square().mean(1), r"shape \(7,\): take its mean or sum"),
        (lambda z: z.square().mean().item(), r"got float: return the loss as torch computes it"),
        (lambda z: z.argmax(), "dtype torch.int64: make it floating point"),
    ],
)
def test_a_loss_that_is_no_scalar_is_named(loss, message, make):
    net = Net(2, 1)
    weighting = make(net.names).double()
    bad = changed_terms(net, lambda z: {"term1": loss(z)})
    with pytest.raises(ConfigError, match=f"^terms: 'term1': expected a tensor of .*{message}"):
        balance(net.embed()[0], bad, net.downstream, weighting)
    with pytest.raises(ConfigError, match=f"^downstream: expected a tensor of .*{message}"):
        balance(net.embed()[0], net.terms, loss, weighting)


BYPASSES = {
    "embedding": lambda net, view: view.square().mean(),
    "image": lambda net, view: net.backbone(net.images[0]).mean(),
    "layer": lambda net, view: net.backbone[0](net.images[0]).mean(),
    "parameter": lambda net, view: net.backbone[0].weight.norm(),
    "tied": lambda net, view: (view.detach() @ net.backbone[2].weight).mean(),
}


@pytest.mark.parametrize("way", BYPASSES)
def test_a_term_that_reaches_the_backbone_past_the_embedding_is_refused(way):
    net = Net(3, 1)
    (view,) = net.embed()
    bad = changed_terms(net, lambda z: {"term1": z.mean() + BYPASSES[way](net, view)})
    with pytest.raises(ConfigError, match="^terms: 'term1' reaches the backbone other than"):
        balance(view, bad, net.downstream, GraP(net.names, recipe="alg1").double())
    # A rule that needs no gradients multiplies the whole term by its weight: nothing is wrong.
    balance(view, bad, net.downstream, Fixed(net.names).double()).loss.backward()
    assert net.backbone[0].weight.grad.any()


@pytest.mark.parametrize("rule", [GraP, Fixed])
@pytest.mark.parametrize("way", BYPASSES)
def test_a_downstream_loss_that_reaches_the_backbone_past_the_embedding_is_refused(way, rule):
    net = Net(3, 1)
    (view,) = net.embed()

    def bad(z):
        return net.downstream(z) + BYPASSES[way](net, view)

    with pytest.raises(ConfigError, match="^downstream: it reaches the backbone other than"):
        balance(view, net.terms, bad, rule(net.names).double())


@pytest.mark.parametrize("make", [GraP, Fixed])
@pytest.mark.parametrize("returned", [None, 3.0, torch.ones(()), [torch.ones(())], {1: None}])
def test_terms_that_are_no_losses_by_name_are_refused(make, returned):
    net = Net(2, 1)
    with pytest.raises(ConfigError, match="^terms: (expected a dict|the weighting is for term0)"):
        balance(net.embed()[0], lambda z: returned, net.downstream, make(net.names).double())


@pytest.mark.parametrize("embeddings", [[], None, [None], [[1.0]], torch.ones(2, 2).long()])
def test_embeddings_that_are_no_tensors_are_refused(embeddings):
    net = Net(2, 1)
    with pytest.raises(ConfigError, match="^embeddings: expected the backbone's output"):
        balance(embeddings, net.terms, net.downstream, GraP(net.names, recipe="alg1"))


def test_names_and_weightings_of_a_wrong_kind_are_refused():
    net = Net(2, 1)
    with pytest.raises(ConfigError, match="^weighting: expected one such as GraP.*got str"):
        balance(net.embed(), net.terms, net.downstream, "grap")
    with pytest.raises(ConfigError, match="^weighting: expected a block of keys"):
        build_weighting("grap", net.names)
    with pytest.raises(ConfigError, match="^terms: expected one or more different names"):
        GraP("ab", recipe="alg1")
    with pytest.raises(ConfigError, match="^SharedHead: unknown name 'term9'"):
        SharedHead(net.names)(torch.ones(2), "term9")


def test_a_detached_use_of_the_backbone_is_allowed_and_the_graph_is_walked_once(monkeypatch):
    net, calls = Net(3, 2), []
    views = net.embed()
    fine = changed_terms(net, lambda *z: {"term1": (z[0] - views[1].detach()).square().mean()})
    weighting = GraP(net.names, recipe="alg1").double()
    module = sys.modules["grap_solo.balance"]
    original = module.find_bypass
    monkeypatch.setattr(module, "find_bypass", lambda *args: calls.append(1) or original(*args))
    for _ in range(3):
        balance(views, fine, net.downstream, weighting)
    assert calls == [1]
    frozen = [each.detach() for each in views]  # A backbone that is not trained has no graph.
    balance(frozen, fine, net.downstream, GraP(net.names, recipe="alg1").double()).loss.backward()
