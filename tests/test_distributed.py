"""Two processes give the statistics, weights and gradients of one on the joined batch."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

from grap_solo import balance, build_weighting
from grap_solo.balance import HeldOut

RULES = {
    "grap": {"name": "grap", "scale": "unit"},
    "grap_held_out": {"name": "grap"},
    "grap_ema": {"name": "grap", "ema": 0.5},
    "gradnorm": {"name": "gradnorm"},
    "dwa": {"name": "dwa"},
    "mgda": {"name": "mgda"},
    "pcgrad": {"name": "pcgrad"},
    "famo": {"name": "famo"},
    "random": {"name": "random", "seed": 3},
    "uncertainty": {"name": "uncertainty"},
    "auxiliary": {"name": "auxiliary", "scale": "reference"},
}


def problem():
    torch.manual_seed(0)
    backbone, head, probe = (torch.nn.Linear(6, 5), torch.nn.Linear(5, 4), torch.nn.Linear(5, 3))
    for module in (backbone, head, probe):
        module.double()
    images, labels = torch.randn(2, 8, 6, dtype=torch.float64), torch.randint(0, 3, (8,))
    return backbone, head, probe, images, labels


def steps(part, rule, count=4):
    """A few steps with unchanged networks on a part of the batch: the weights of each, and the
    last step's gradients by backbone and head."""
    backbone, head, probe, (images, others), labels = problem()
    images, others, labels = images[part], others[part], labels[part]
    weighting = build_weighting(RULES[rule], ["a", "b"], {"a": 0.5, "b": 2.0}).double()

    def terms(z):
        return {"a": head(z).square().mean(), "b": torch.tanh(z).mean() + 2}

    weights = []
    for number in range(count):
        for module in (backbone, head):
            module.zero_grad()
        held_out = None
        if rule == "grap_held_out":
            held_out = HeldOut([backbone(others).detach()], terms)
        step = balance(
            backbone(images + number),
            terms,
            lambda z: F.cross_entropy(probe(z), labels),
            weighting,
            held_out=held_out,
        )
        step.loss.backward()
        weights.append(step.weights.double())
        weighting.end_epoch()
        if weighting.needs_losses_after:
            with torch.no_grad():
                after = torch.stack(list(terms(0.9 * backbone(images + number)).values()))
            if dist.is_initialized():
                dist.all_reduce(after)
                after /= 2
            weighting.after_step(after)
    return torch.stack(weights), torch.cat([backbone.weight.grad.T, head.weight.grad], dim=0)


def process(rank, path, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found = {}
    for rule in RULES:
        weights, gradient = steps(slice(4 * rank, 4 * rank + 4), rule)
        dist.all_reduce(gradient)  # As DDP averages.
        found[rule] = (weights, gradient / 2)
    torch.save(found, f"{path}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks")
    mp.spawn(process, (str(path), 29500 + os.getpid() % 1000), nprocs=2)
    return [torch.load(path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("rule", RULES)
def test_two_processes_equal_one_on_the_joined_batch(rule, both):
    weights, gradient = steps(slice(None), rule)
    for found in both:
        torch.testing.assert_close(found[rule][0], weights, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found[rule][1], gradient, rtol=1e-6, atol=1e-9)
    constant = rule in ("auxiliary", "uncertainty")
    assert (
        torch.allclose(weights[0] / weights[0].sum(), weights[-1] / weights[-1].sum()) == constant
    )
