"""Communication between the ranks of a distributed run; every function also works without one."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """The number of ranks; 1 outside a distributed run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among the ranks, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of all ranks' tensors, without gradient."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def gather(tensor: Tensor) -> Tensor:
    """All ranks' tensors, joined along the first dimension, without gradient."""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
