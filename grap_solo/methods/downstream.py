"""The downstream heads of a ``downstream:`` block: one linear head for each of its entries."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_average_precision

from grap_solo.distributed import mean_over_ranks
from grap_solo.errors import ConfigError


class KeptRows(Metric):
    """Keeps rows (B, columns) of all batches and ranks, until they are computed on."""

    full_state_update = False
    kept: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("kept", default=[], dist_reduce_fx="cat")

    def update(self, rows: Tensor) -> None:
        """Adds rows."""
        self.kept.append(rows.detach())

    def compute(self) -> Tensor:
        """All rows, (N, columns), on the CPU in float64."""
        kept: Any = self.kept  # One tensor, once it is joined over the ranks.
        return (kept if isinstance(kept, Tensor) else torch.cat(kept)).cpu().double()


class Head(nn.Linear):
    """A linear head on the embedding.

    Args:
        features_dim: the embedding's dimension D.
        entry: the head's entry in the ``downstream:`` block, completed from its targets.

    Attributes:
        kept: the numbers of all validation images from which the measures are computed.
    """

    measure: ClassVar[str]
    """The measure that a progress bar shows."""

    filled_in: ClassVar[tuple[str, ...]] = ()
    """The keys of the entry that are filled in from the targets."""

    def __init__(self, features_dim: int, entry: Mapping[str, Any]) -> None:
        super().__init__(features_dim, self.width(entry))
        self.kept = KeptRows()

    @staticmethod
    @abstractmethod
    def width(entry: Mapping[str, Any]) -> int:
        """The number of the head's outputs."""

    @abstractmethod
    def losses(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each target, and whether it is known; 0 where it is not. In the shape of
        ``targets``: (B,), or (B, L) for L labels."""

    @abstractmethod
    def rows(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The numbers of each image from which :meth:`measures` computes, (B, columns)."""

    @abstractmethod
    def measures(self, rows: Tensor) -> dict[str, float]:
        """The measures over all images by name, without those that have no value.

        Args:
            rows: those of :meth:`rows`, in float64.
        """


class Classification(Head):
    """Cross-entropy. Measures top-1 and top-5 accuracy in percent."""

    measure = "acc1"
    filled_in = ("classes",)

    @staticmethod
    def width(entry: Mapping[str, Any]) -> int:
        return int(entry["classes"])

    def losses(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        losses = F.cross_entropy(outputs, targets, ignore_index=-1, reduction="none")
        return losses, targets != -1

    def rows(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses, known = self.losses(outputs, targets)
        best = outputs.float().topk(min(5, outputs.size(1)), dim=1).indices
        hits = best == targets[:, None]
        columns = [known, losses, hits[:, 0], hits.any(1)]
        return torch.stack([each.float() for each in columns], 1)

    def measures(self, rows: Tensor) -> dict[str, float]:
        known = rows[rows[:, 0] == 1]
        if not len(known):
            return {}
        _, loss, acc1, acc5 = known.mean(0).tolist()
        return {"loss": loss, "acc1": 100 * acc1, "acc5": 100 * acc5}


class Regression(Head):
    """Squared error of standardised targets. Measures R2, and the mean absolute error in the
    targets' unit."""

    measure = "r2"
    filled_in = ("mean", "sd")
    mean: Tensor
    sd: Tensor

    def __init__(self, features_dim: int, entry: Mapping[str, Any]) -> None:
        super().__init__(features_dim, entry)
        for name in ("mean", "sd"):  # With them a checkpoint can predict in the targets' unit.
            self.register_buffer(name, torch.tensor(float(entry[name])))

    @staticmethod
    def width(entry: Mapping[str, Any]) -> int:
        return 1

    def losses(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        known = ~targets.isnan()
        wanted = (targets.nan_to_num() - self.mean) / self.sd
        losses = (outputs.squeeze(1).to(wanted.dtype) - wanted).square()
        return torch.where(known, losses, 0), known

    def rows(self, outputs: Tensor, targets: Tensor) -> Tensor:
        wanted = (targets - self.mean) / self.sd
        return torch.stack([outputs.squeeze(1).to(wanted.dtype), wanted], 1)

    def measures(self, rows: Tensor) -> dict[str, float]:
        found, wanted = rows[~rows[:, 1].isnan()].T
        if not len(found):
            return {}
        errors, spread = found - wanted, (wanted - wanted.mean()).square().sum()
        measured = {
            "loss": errors.square().mean().item(),
            "mae": (errors.abs().mean() * self.sd.cpu()).item(),
        }
        if spread > 0:
            measured["r2"] = (1 - errors.square().sum() / spread).item()
        return measured


class MultiLabel(Head):
    """Binary cross-entropy of each label. Measures the mean over the labels of the average
    precision, in percent."""

    measure = "map"

    @staticmethod
    def width(entry: Mapping[str, Any]) -> int:
        return len(entry["columns"])

    def losses(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        known = ~targets.isnan()
        wanted = targets.nan_to_num()
        losses = F.binary_cross_entropy_with_logits(
            outputs.to(wanted.dtype), wanted, reduction="none"
        )
        return torch.where(known, losses, 0), known

    def rows(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.cat([outputs.to(targets.dtype), targets], 1)

    def measures(self, rows: Tensor) -> dict[str, float]:
        outputs, targets = rows.chunk(2, dim=1)
        losses, known = self.losses(outputs, targets)
        if not known.any():
            return {}
        measured = {"loss": (losses.sum() / known.sum()).item()}
        wanted = targets.nan_to_num(-1).long()
        precisions = [  # Of a label that no image has, it is undefined.
            binary_average_precision(outputs[:, k].sigmoid(), wanted[:, k], ignore_index=-1)
            for k in range(self.out_features)
            if (wanted[:, k] == 1).any()
        ]
        if precisions:
            measured["map"] = 100 * torch.stack(precisions).mean().item()
        return measured


TASKS: dict[str, type[Head]] = {
    "classification": Classification,
    "regression": Regression,
    "multi_label": MultiLabel,
}
"""The class of a head by its ``task``."""


def no_targets_given() -> ConfigError:
    """The error for a loader that gives class labels alone."""
    return ConfigError(
        "downstream: solo-learn's scripts read class labels alone: train with grap-solo pretrain, "
        "or leave the block out"
    )


class DownstreamHeads(nn.Module):
    """The downstream heads of a run. Takes the place of the online probe's linear layer.

    Args:
        features_dim: the embedding's dimension D.
        entries: the ``downstream:`` block, completed from the heads' targets.

    Attributes:
        names: the heads' names, in the block's order.
        weights: the weight of each head's loss, by its name.
        last_losses: each head's loss in the last step, shape (), by its name.

    Raises:
        ConfigError: the block is not completed, as in solo-learn's own script.
    """

    def __init__(self, features_dim: int, entries: Mapping[str, Any]) -> None:
        super().__init__()
        self.names = tuple(entries)
        self.weights = {name: float(entry["weight"]) for name, entry in entries.items()}
        self.last_losses: dict[str, Tensor] = {}
        # Sorted: the optimiser's state counts parameters, whatever the order in the block.
        for name in sorted(entries):
            entry = entries[name]
            if any(entry.get(key) is None for key in TASKS[entry["task"]].filled_in):
                raise no_targets_given()
            # The suffix keeps a name such as "type" apart from torch's attributes.
            self.add_module(f"{name}_head", TASKS[entry["task"]](features_dim, entry))

    def head(self, name: str) -> Head:
        """The head of an entry."""
        found = getattr(self, f"{name}_head")
        assert isinstance(found, Head)
        return found

    @property
    def classifier(self) -> Classification | None:
        """The first head that classifies; None if there is none."""
        heads = map(self.head, self.names)
        return next((each for each in heads if isinstance(each, Classification)), None)

    def labels(self, targets: Mapping[str, Tensor]) -> Tensor:
        """The labels (B,) of the first head that classifies; -1 for each image if there is none."""
        for name in self.names:
            if isinstance(self.head(name), Classification):
                return targets[name]
        some = next(iter(targets.values()))
        return torch.full((len(some),), -1, device=some.device)

    def forward(self, feats: Tensor) -> Tensor:
        """The outputs of all heads side by side, (B, outputs), in the block's order."""
        return torch.cat([self.head(name)(feats) for name in self.names], 1)

    def loss(self, embeddings: Sequence[Tensor], targets: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the heads' losses over all views, shape ().

        The loss of a head is the mean over its known targets; 0 if the batch has none. On several
        ranks the batch is the joined one: a rank's sum is divided by the mean number of known
        targets of a rank, so that the mean of the ranks' losses is the joined batch's. This costs
        one all-reduce of a number for each head.

        Args:
            embeddings: one (B, D) for each view.
            targets: each head's targets by its name, (B,) or (B, L).
        """
        sums, counts = [], []
        for name in self.names:
            head = self.head(name)
            found = [head.losses(head(each), targets[name]) for each in embeddings]
            sums.append(torch.stack([losses.sum() for losses, _ in found]).mean())
            counts.append(found[0][1].sum())
        known = mean_over_ranks(torch.stack(counts).to(sums[0].dtype))
        losses = torch.stack(sums) / torch.where(known > 0, known, 1)
        self.last_losses = dict(zip(self.names, losses.detach(), strict=True))
        parts = zip(self.weights.values(), losses, strict=True)
        return torch.stack([weight * each for weight, each in parts]).sum()

    def keep(self, feats: Tensor, targets: Mapping[str, Tensor]) -> None:
        """Keeps the numbers of a validation batch, with embeddings (B, D), for :meth:`measure`."""
        for name in self.names:
            head = self.head(name)
            head.kept.update(head.rows(head(feats), targets[name]))

    def measure(self) -> dict[str, float]:
        """The measures of all batches and ranks since the last call, as ``val_<head>_<measure>``.

        Those of the first head that classifies also have the names of a single probe."""
        found: dict[str, float] = {}
        single: dict[str, float] = {}
        for name in self.names:
            head = self.head(name)
            measured = head.measures(head.kept.compute())
            head.kept.reset()
            found |= {f"val_{name}_{key}": value for key, value in measured.items()}
            if head is self.classifier:
                single = {f"val_{key}": value for key, value in measured.items()}
        return {**single, **found}
