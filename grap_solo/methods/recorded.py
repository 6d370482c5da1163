"""Records of each step: its metrics, diagnostics and effective weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.nn import functional as F

from grap_solo.balance import HeldOut, Step
from grap_solo.diagnostics import diagnose, diagnostic_names, parameter_space_cosine
from grap_solo.evaluation.online import top1_and_top5
from grap_solo.methods.losses import Projections, Views
from grap_solo.methods.probed import ProbedMethod
from grap_solo.records.trajectory import CollapseWatch, TrajectoryRecorder
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
        diagnostics: the last usable step's cosines and norms, by the names of
            :func:`~grap_solo.diagnostics.diagnostic_names`.
        parameter_space_every: steps between two measurements of
            :func:`~grap_solo.diagnostics.parameter_space_cosine`; 0 for none.
        loss_metric: see :class:`~grap_solo.methods.composite.CompositeMethod`.
        term_metrics: see :class:`~grap_solo.methods.composite.CompositeMethod`.
    """

    weighting: Weighting
    effective_weights: Tensor
    shown_weights: list[float]
    diagnostics: dict[str, Tensor]
    parameter_space_every: int
    loss_metric: ClassVar[str]
    term_metrics: ClassVar[Mapping[str, str]]

    def configure_callbacks(self) -> list[Callback]:
        """Adds the recorder of the effective weights and the watch for a collapse, for solo-learn's
        scripts too."""
        recorder = TrajectoryRecorder()
        return [recorder, CollapseWatch(recorder)]

    def _diagnose(self, step: Step, feats: Views, held_out: HeldOut | None) -> dict[str, Tensor]:
        """Computes the cosines and norms of the step's gradients for the recorder, by name.

        It must come before the backward pass, which frees the embeddings' graph."""
        found = diagnose(step)
        if found is None:
            return {}
        diagnostics = dict(zip(diagnostic_names(self.weighting.terms), found, strict=True))
        every = self.parameter_space_every
        if every:
            cosine = found.new_tensor(torch.nan)
            if self.global_step % every == 0 and held_out is None:
                cosine = parameter_space_cosine(
                    step, step.downstream_gradients, feats, self.backbone
                )
            diagnostics["parameter_space"] = cosine
        return diagnostics

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
        if self.heads_downstream is not None:
            last = self.heads_downstream.last_losses
            logged |= {f"downstream/{name}": each for name, each in last.items()}
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
        """Logs the probe's loss and accuracy on a held-out batch, or the downstream heads' loss."""
        metrics = {"train_labelled_loss": step.downstream}
        if self.online_probe is not None:
            logits = [self.online_probe(each) for each in held_out.embeddings]
            accuracies = [top1_and_top5(each, labels)[0] for each in logits]
            metrics["train_labelled_acc1"] = torch.cat(accuracies).mean()
        self.log_dict(metrics, on_epoch=True, sync_dist=True)
