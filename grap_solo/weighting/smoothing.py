"""Averages over steps of the Gramian, the products and the gradients' norms."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Cosines(NamedTuple):
    """A Gramian and products of gradients of norm 1.

    Attributes:
        gramian: the cosines between the terms' gradients, shape (K, K).
        products: the products divided by the terms' norms, shape (K,).
        norms: of the terms' gradients, shape (K,).
    """

    gramian: Tensor
    products: Tensor
    norms: Tensor


def to_cosines(gramian: Tensor, products: Tensor) -> Cosines:
    """Divides a Gramian, (K, K), and products, (K,), by the gradients' norms.

    A term without a gradient gets cosines of 0.
    """
    norms = gramian.diagonal().sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0)
    return Cosines(gramian * inverse[:, None] * inverse, products * inverse, norms)


def with_norms(gramian: Tensor, products: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """Multiplies a Gramian, (K, K), and products, (K,), by the gradients' norms, (K,)."""
    return gramian * norms[:, None] * norms, products * norms


def average_on(past: Tensor, current: Tensor, steps: Tensor, share: float, first: int) -> Tensor:
    """An average that is plain over the first steps and exponential after them.

    Args:
        past: the average of the steps before, of any shape.
        current: this step's value, of the same shape.
        steps: how many steps ``past`` is an average of, shape (). If 0, the result is ``current``.
        share: the share of the past after the first steps.
        first: the number of first steps, at least 1.
    """
    kept = torch.where(steps < first, steps / (steps + 1), share).to(current)
    return kept * past.to(current) + (1 - kept) * current
