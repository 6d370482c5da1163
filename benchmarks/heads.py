"""Times the parts of a step beside the backbone: heads, queue, probe, optimiser, momentum.

    python benchmarks/heads.py [fixed grap solo_learn] [--method all4one] [--batch 64] [--rounds 40]

The contenders are those of ``bench step``, with a table of embeddings for a backbone. They take
turns in one process. Prints the milliseconds of a step, of the optimiser alone and of the
momentum update alone (medians over the rounds).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from grap_solo.cli import exit_on_refusal
from grap_solo.experiments.bench import contender
from grap_solo.experiments.timing import Contender, in_turns
from grap_solo.report.tables import markdown
from grap_solo.solo import BASE


class Table(nn.Module):
    """A backbone that costs nothing: it learns one embedding for each place in the batch."""

    def __init__(self, batch: int, features: int) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(torch.randn(batch, features))

    def forward(self, images: Tensor) -> Tensor:
        return self.embeddings + images.mean()


def without_backbone(name: str, method: str, batch: int) -> Contender:
    mine = contender(name, method, batch, "cpu", "32-true")
    features = mine.model.features_dim
    mine.model.backbone = Table(batch, features)
    if hasattr(mine.model, "momentum_backbone"):
        mine.model.momentum_backbone = Table(batch, features).requires_grad_(False)
    mine.optimizer = mine.model.configure_optimizers()
    return mine


def timed(part: Callable[[Contender], object], mine: Contender) -> float:
    start = time.perf_counter()
    part(mine)
    return time.perf_counter() - start


def optimiser(mine: Contender) -> None:
    mine.optimizer.step()


def momentum(mine: Contender) -> None:
    mine.update_momentum()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    there = ["fixed", "grap", *(["solo_learn"] if BASE == "solo-learn" else [])]
    parser.add_argument("contenders", nargs="*", default=there)
    parser.add_argument("--method", default="all4one")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=40)
    given = parser.parse_args()
    made = {name: without_backbone(name, given.method, given.batch) for name in given.contenders}
    parts: dict[str, Callable[[Contender], float]] = {
        "step": Contender.seconds,
        "optimiser": partial(timed, optimiser),
        "momentum update": partial(timed, momentum),
    }
    columns = []
    for part in parts.values():
        turns = {name: partial(part, mine) for name, mine in made.items()}
        columns.append(in_turns(turns, given.rounds, warmup=5))
    rows = [
        [name, *(f"{1000 * statistics.median(times[name]):.1f}" for times in columns)]
        for name in made
    ]
    print(markdown([["contender", *(f"{part}, ms" for part in parts)], *rows]))


if __name__ == "__main__":
    with exit_on_refusal():
        main()
