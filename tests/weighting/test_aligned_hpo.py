"""GraP against the released optimiser of its authors (github.com/ivan-chai/aligned-hpo), side by
side in float64 on networks that start alike and see the same batches."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grap_solo import GraP, SharedHead, balance

pytestmark = pytest.mark.aligned_hpo

STEPS = 200
NAMES = ["nnclr", "attn_nnclr", "feature"]
REFERENCE = dict(zip(NAMES, [0.5, 0.5, 5.0]))


@pytest.fixture(autouse=True)
def float64():
    """The buffers of their normaliser have the default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


class Embeddings(nn.Module):
    """A backbone whose parameters are the embeddings: the norm of a gradient is the same by both.

    Their regularisation divides by the ratio of the two norms, which a weighting cannot know."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(torch.randn(8, 5))

    def forward(self, images):
        return self.embeddings


class Net(nn.Module):
    """A backbone, a projector that the terms may share, a head for each term, and a probe."""

    def __init__(self, isometric: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5))
        self.backbone = Embeddings() if isometric else layers
        self.projector = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 3 + k), nn.Tanh(), nn.Linear(3 + k, 2)) for k in range(3)
        )
        self.probe = nn.Linear(5, 3)

    def terms(self, z, batch, shared=None):
        out, losses = self.projector(z), {}
        for k, (name, head) in enumerate(zip(NAMES, self.heads)):
            seen = out if shared is None else shared(out, name)
            # Of different sizes, and the last one wants what the others do not.
            losses[name] = 4.0**-k * F.mse_loss(head(seen), (-1) ** k * batch[1 + k])
        return losses

    def downstream(self, z, batch):
        return F.cross_entropy(self.probe(z), batch[-1])


def batches():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(STEPS, 8, 6, generator=generator)
    for x in images:
        noise = 0.1 * torch.randn(3, 8, 2, generator=generator)
        yield (x, *(x[:, :2].sin() + noise), (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


def theirs(net, weights_group, shared_groups=(), **settings):
    """The effective weights of each step as their optimiser trains ``net``."""
    from aligned_hpo import AlignedHPOptimizer

    weights = nn.Parameter(torch.ones(3))
    groups = [
        {"params": [weights], **weights_group},
        {"params": [*net.heads.parameters(), *net.probe.parameters()]},
        {"params": list(net.projector.parameters())},
        {"params": list(net.backbone.parameters())},
    ]
    optimizer = AlignedHPOptimizer(
        groups,
        torch.optim.SGD,
        base_optimizer_params={"lr": 0.01, "momentum": 0.9},
        weights_optimizer_cls=torch.optim.Adam,
        heads_groups=[1] if shared_groups else [1, 2],
        shared_groups=shared_groups,
        weights_names=NAMES,
        rescale_grad_norm_weights=list(REFERENCE.values()),
        encoder_decoder=True,
        **settings,
    )
    path = []
    for batch in batches():
        embedding = net.backbone(batch[0])
        z = embedding.detach().clone().requires_grad_()
        losses, down = net.terms(z, batch), net.downstream(z, batch)

        def closure(part, factors, retain_graph=False, stage=None, z=z, losses=losses, down=down):
            optimizer.zero_grad()
            z.grad = None
            loss = part * down + sum(w * losses[name] for w, name in zip(factors, NAMES))
            loss.backward(retain_graph=retain_graph)
            return z

        def encoder(gradient, embedding=embedding):
            optimizer.zero_grad()
            embedding.backward(gradient.view_as(embedding))

        optimizer.hpo_step(closure, encoder)
        metrics = optimizer.metrics
        path.append(torch.stack([metrics[f"effective_weights_{name}"] for name in NAMES]))
    return torch.stack(path)


def ours(net, **keys):
    """The effective weights of each step as :func:`balance` trains ``net``."""
    weighting = GraP(NAMES, REFERENCE, **{"recipe": "alg1"} | keys)
    shared = SharedHead(NAMES, net.projector.parameters())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    path = []
    for batch in batches():
        step = balance(
            net.backbone(batch[0]),
            lambda z, batch=batch: net.terms(z, batch, shared),
            lambda z, batch=batch: net.downstream(z, batch),
            weighting,
            shared,
        )
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        assert step.finite and weighting.cause == 0
        path.append(step.weights)
    return torch.stack(path)


VISION = {"algorithm": "sgd", "ema": {"covs": 0.0, "stats": 0.99}}
CASES = {
    "vision": ({"lr": 0.1}, VISION, {"recipe": "paper"}),
    "base learning rate": ({}, VISION, {"recipe": "paper", "lr": 0.01}),
    "defaults": (
        {"lr": 0.1},
        {"algorithm": "sgd"},
        {"recipe": "paper", "ema": 0.9, "norm_ema": 0.9},
    ),
    "no first steps": (
        {"lr": 0.1},
        {**VISION, "warmup": 0, "ema": {"covs": 0.5, "stats": 0.0}},
        {"recipe": "paper", "average_first": 1, "ema": 0.5, "norm_ema": 0.0},
    ),
    "aligned_mtl": (
        {"lr": 0.1},
        {**VISION, "shared_algorithm": "aligned-mtl", "shared_groups": [2]},
        {"recipe": "paper", "shared_heads": "aligned_mtl"},
    ),
}


@pytest.mark.parametrize("case", [*CASES, "regularization"])
def test_both_train_the_same_network_with_the_same_weights(case):
    weights_group, settings, keys = CASES.get(case, CASES["vision"])
    isometric = case == "regularization"
    if isometric:
        settings, keys = {**settings, "regularization": 1.0}, {**keys, "regularization": 1.0}
    one, other = Net(isometric), Net(isometric)
    start = copy.deepcopy(one.state_dict())
    expected, found = theirs(one, weights_group, **settings), ours(other, **keys)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert expected.std(dim=0).min() > 0.01  # The weights have moved, and each is needed at times.
    for (name, mine), right in zip(other.state_dict().items(), one.state_dict().values()):
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-6, msg=name)
        assert not torch.equal(right, start[name]), name
