"""Records of each step: its metrics, diagnostics, effective weights, and whether it was skipped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.nn import functional as F

from grap_solo.balance import HeldOut, Step
from grap_solo.diagnostics import diagnose, diagnostic_names, parameter_space_cosine
from grap_solo.errors import RunStopped
from grap_solo.evaluation.online import top1_and_top5
from grap_solo.methods.losses import Projections, Views
from grap_solo.methods.probed import ProbedMethod
from grap_solo.records.trajectory import TrajectoryRecorder
from grap_solo.weighting import CAUSES, Weighting


class TermLosses(dict[str, Tensor]):
    """The terms' losses by name, with the projections that they were computed from."""

    def __init__(self, losses: Mapping[str, Tensor], projections: Projections) -> None:
        super().__init__(losses)
        self.projections = projections


class RecordedMethod(ProbedMethod):
    """A method that records its steps.

    Attributes:
        weighting: turns a step's statistics into effective weights.
        effective_weights: the effective weights of the last usable step, shape (K,).
        shown_weights: the same weights as numbers on the host.
        diagnostics: the last step's cosines and norms, by the names of
            :func:`~grap_solo.diagnostics.diagnostic_names`.
        parameter_space_every: steps between two measurements of
            :func:`~grap_solo.diagnostics.parameter_space_cosine`; 0 for none.
        max_skipped_steps: the number of skipped steps in a row at which the run stops.
        skipped_in_a_row: the number of steps skipped since the last usable step.
        loss_metric: see :class:`~grap_solo.methods.composite.CompositeMethod`.
        term_metrics: see :class:`~grap_solo.methods.composite.CompositeMethod`.
    """

    weighting: Weighting
    effective_weights: Tensor
    shown_weights: list[float]
    diagnostics: dict[str, Tensor]
    parameter_space_every: int
    max_skipped_steps: int
    skipped_in_a_row: int
    loss_metric: ClassVar[str]
    term_metrics: ClassVar[Mapping[str, str]]

    def configure_callbacks(self) -> list[Callback]:
        """Adds the recorder of the effective weights, for solo-learn's scripts too."""
        return [TrajectoryRecorder()]

    def _is_usable(self, step: Step) -> bool:
        """Whether a step is finite on every rank.

        Reading a number makes the host wait for the GPU. The weights are therefore read here too:
        one wait a step."""
        self.log("skipped/step", (~step.finite).float(), on_step=False, on_epoch=True, batch_size=1)
        finite, *weights = torch.cat([step.finite.to(step.weights)[None], step.weights]).tolist()
        if finite:
            self.skipped_in_a_row = 0
            self.effective_weights, self.shown_weights = step.weights, weights
            return True
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.max_skipped_steps:
            losses = {**step.losses, "the probe's loss": step.downstream}
            bad = [name for name, each in losses.items() if not each.isfinite()]
            raise RunStopped(
                f"diagnostics.max_skipped_steps: {self.skipped_in_a_row} steps in a row were not "
                f"finite ({', '.join(bad) or 'gradients'}): the run stops; its checkpoints are "
                "from earlier steps: try a lower optimizer.lr, or precision 32-true"
            )
        return False

    def _diagnose(self, step: Step, feats: Views, held_out: HeldOut | None) -> None:
        """Computes the cosines and norms of the step's gradients for the recorder."""
        found = diagnose(step)
        if found is None:
            return
        self.diagnostics = dict(zip(diagnostic_names(self.weighting.terms), found, strict=True))
        every = self.parameter_space_every
        if every:
            cosine = found.new_tensor(torch.nan)
            if self.global_step % every == 0 and held_out is None:
                cosine = parameter_space_cosine(
                    step, step.downstream_gradients, feats, self.backbone
                )
            self.diagnostics["parameter_space"] = cosine

    def _log_step(self, step: Step, metrics: dict[str, Tensor]) -> None:
        """Logs the active terms, their reference-weighted sum, the metrics and the weights."""
        losses = step.losses
        logged = {
            self.term_metrics.get(term, f"train_{term}_loss"): each for term, each in losses.items()
        }
        if losses:
            reference = dict(zip(self.weighting.terms, self.weighting.reference, strict=True))
            parts = [reference[term] * each for term, each in losses.items()]
            logged[self.loss_metric] = torch.stack(parts).sum()
        if isinstance(step.returned, TermLosses) and step.returned.projections:
            views = next(iter(step.returned.projections.values()))
            stds = [F.normalize(each, dim=-1).std(dim=0).mean() for each in views]
            logged["train_z_std"] = torch.stack(stds).mean()
        self.log_dict({**logged, **metrics}, on_epoch=True, sync_dist=True)
        weighting = {
            f"weight/{term}": weight
            for term, weight in zip(self.weighting.terms, step.weights, strict=True)
        }
        names = ["alignment", *(f"alignment/{term}" for term in self.weighting.terms)]
        for name in names if self.diagnostics else ():
            weighting[name] = self.diagnostics[name].nan_to_num()
        self.log_dict(weighting)
        if step.gradients and self.weighting.cause is not None:
            skipped = {
                f"skipped/{cause.replace(' ', '_')}": (self.weighting.cause == index).float()
                for index, cause in enumerate(CAUSES)
                if cause
            }
            self.log_dict(skipped, on_step=False, on_epoch=True)

    def _log_labelled(self, step: Step, held_out: HeldOut, labels: Tensor) -> None:
        """Logs the probe's loss and accuracy on a held-out batch."""
        logits = [self.classifier(each) for each in held_out.embeddings]
        accuracies = [top1_and_top5(each, labels)[0] for each in logits]
        metrics = {
            "train_labelled_loss": step.downstream,
            "train_labelled_acc1": torch.cat(accuracies).mean(),
        }
        self.log_dict(metrics, on_epoch=True, sync_dist=True)
