"""Two processes give the statistics, weights and gradients of one on the joined batch."""

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

from grap_solo import GraP, balance


def problem():
    torch.manual_seed(0)
    backbone, head, probe = (torch.nn.Linear(6, 5), torch.nn.Linear(5, 4), torch.nn.Linear(5, 3))
    for module in (backbone, head, probe):
        module.double()
    images, labels = torch.randn(8, 6, dtype=torch.float64), torch.randint(0, 3, (8,))
    return backbone, head, probe, images, labels


def steps(images, labels, backbone, head, probe, weighting, count=3):
    """A few steps with unchanged networks: the weights of each, and the last gradients."""
    weights = []
    for _ in range(count):
        backbone.zero_grad()
        step = balance(
            backbone(images),
            lambda z: {"a": head(z).square().mean(), "b": torch.tanh(z).mean()},
            lambda z: F.cross_entropy(probe(z), labels),
            weighting,
        )
        step.loss.backward()
        weights.append(step.weights)
    return torch.stack(weights), backbone.weight.grad


def process(rank, path, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    backbone, head, probe, images, labels = problem()
    part = slice(4 * rank, 4 * rank + 4)
    weighting = GraP(["a", "b"], {"a": 0.5, "b": 2.0}, scale="unit").double()
    weights, gradient = steps(images[part], labels[part], backbone, head, probe, weighting)
    dist.all_reduce(gradient)  # As DDP averages.
    torch.save((weights, gradient / 2), f"{path}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one_on_the_joined_batch(tmp_path):
    port = 29500 + os.getpid() % 1000
    mp.spawn(process, (str(tmp_path), port), nprocs=2)
    backbone, head, probe, images, labels = problem()
    weighting = GraP(["a", "b"], {"a": 0.5, "b": 2.0}, scale="unit").double()
    weights, gradient = steps(images, labels, backbone, head, probe, weighting)
    for rank in (0, 1):
        both = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(both[0], weights)
        torch.testing.assert_close(both[1], gradient)
    assert not torch.allclose(weights[0], weights[-1])
