"""A step that is not finite changes nothing: no parameter, running statistic, weight or queue."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from grap_solo.balance import HeldOut, Step
from grap_solo.errors import Diverged
from grap_solo.methods.modules import batch_norms
from grap_solo.methods.recorded import RecordedMethod

ADAPTED = ("inner_scale", "finite_steps")
"""The weighting's buffers that learn from a step because it is not finite."""


@dataclass(frozen=True)
class Taken:
    """A step whose backward pass is still to come.

    Attributes:
        step: the result of :func:`~grap_solo.balance.balance`.
        outputs: what the base's training step returned.
        targets: what ``make_targets`` returned.
        batch: ``[indexes, [view1, view2], labels]``.
        held_out: the labelled batch; None if the labels are not held out.
        labels: those that train the probe, (B,); with a ``downstream:`` block those of its first
            head that classifies.
        diagnostics: the step's cosines and norms, by name.
    """

    step: Step
    outputs: Mapping[str, Any]
    targets: Any
    batch: Sequence[Any]
    held_out: HeldOut | None
    labels: Tensor
    diagnostics: dict[str, Tensor]


class GuardedMethod(RecordedMethod, ABC):
    """A method that judges each step after its backward pass, and undoes it if it is not finite.

    Attributes:
        usable: whether the last step was finite. If not, the optimiser got no gradients.
        usable_in_epoch: the number of usable steps of this epoch.
        max_skipped_steps: the number of skipped steps in a row at which the run stops.
        skipped_in_a_row: the number of steps skipped since the last usable step.
    """

    max_skipped_steps: int
    usable: bool = True
    usable_in_epoch: int = 0
    skipped_in_a_row: int = 0
    _gradients_usable: bool = True  # Of the steps since the optimiser's last one.
    _taken: Taken | None = None
    _norms: list[nn.Module] | None = None
    _before: Remembered

    @abstractmethod
    def finish_step(self, taken: Taken) -> None:
        """Updates the method's state, and logs the step. Called for usable steps."""

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.usable_in_epoch = 0

    def on_after_backward(self) -> None:
        """Finishes the step, or undoes it if it is not finite."""
        super().on_after_backward()
        taken, self._taken = self._taken, None
        if taken is None:
            return
        if self._judge(taken.step):
            attached = self._trainer is not None
            plugin = self.trainer.precision_plugin if attached else None
            with torch.no_grad(), plugin.forward_context() if plugin else nullcontext():
                self.finish_step(taken)
        elif not self._accumulates():
            self.zero_grad(set_to_none=True)  # The optimiser passes over these parameters.

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Takes the optimiser's step. A gradient scaler must not look for gradients that a step
        which is not finite has not left: it is told that there was no backward pass."""

        def closure() -> Tensor | None:
            loss: Tensor | None = optimizer_closure()
            return loss if self.usable else None

        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        self._gradients_usable = True

    def _accumulates(self) -> bool:
        """Whether further gradients are added to these before the optimiser's step."""
        return self._trainer is not None and self.trainer.fit_loop._should_accumulate()

    def _judge(self, step: Step) -> bool:
        """Whether a step is finite, parameter gradients included. Restores the state if not.

        All ranks must agree, since a usable step communicates: ``step.finite`` is the same on each
        of them, and so are gradients once they are reduced. Accumulated gradients are not reduced
        before the optimiser's step, so they are looked at only then: a step that is not finite
        costs the others that it is accumulated with.

        Reading a number makes the host wait for the GPU. The weights are therefore read here too:
        one wait a step."""
        finite = step.finite
        if not (self._accumulates() or self._scales_gradients()):
            gradients = [each.grad for each in self.parameters() if each.grad is not None]
            finite = finite & _all_finite(gradients).to(finite.device)
        if not self._gradients_usable:
            finite = torch.zeros_like(finite)
        self.log("skipped/step", (~finite).float(), on_step=False, on_epoch=True, batch_size=1)
        flags = torch.stack([finite, _all_finite(self._before.tensors).to(finite.device)])
        usable, intact, *weights = torch.cat([flags.to(step.weights), step.weights]).tolist()
        self.usable = bool(usable)
        if not usable or not intact:
            self._before.restore()
        if usable:
            self.skipped_in_a_row = 0
            self.usable_in_epoch += 1
            self.effective_weights, self.shown_weights = step.weights, weights
            return True
        self._gradients_usable = False
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.max_skipped_steps:
            losses = {**step.losses, "the probe's loss": step.downstream}
            bad = [name for name, each in losses.items() if not each.isfinite()]
            raise Diverged(
                f"diagnostics.max_skipped_steps: {self.skipped_in_a_row} steps in a row were not "
                f"finite ({', '.join(bad) or 'gradients'}): the run stops: try a lower "
                "optimizer.lr, or precision 32-true"
            )
        return False

    def _scales_gradients(self) -> bool:
        """Whether a gradient scaler looks after gradients that overflow."""
        attached = self._trainer is not None
        return attached and getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def _remember_state(self) -> None:
        """Keeps what a step's forward passes change: running statistics and learned weights."""
        if self._norms is None:  # After Lightning has replaced batch-norms by synchronised ones.
            self._norms, self._before = batch_norms(self), Remembered()
        buffers = [each for norm in self._norms for each in norm.buffers(recurse=False)]
        learned = self.weighting.named_buffers()
        buffers += [each for name, each in learned if name not in ADAPTED]
        self._before.remember(buffers)


class Remembered:
    """Tensors, and copies of them to restore them from."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.copies: list[Tensor] = []

    def remember(self, tensors: Sequence[Tensor]) -> None:
        """Copies tensors. The copies keep their memory from step to step."""
        # Floating-point numbers first: one kernel copies tensors of one dtype.
        self.tensors = sorted(tensors, key=lambda each: not each.is_floating_point())
        if [_layout(each) for each in self.tensors] != [_layout(each) for each in self.copies]:
            self.copies = [torch.empty_like(each) for each in self.tensors]
        self._copy(self.tensors, self.copies)

    def restore(self) -> None:
        """Gives the tensors their copies' values."""
        self._copy(self.copies, self.tensors)

    @torch.no_grad()
    def _copy(self, source: list[Tensor], target: list[Tensor]) -> None:
        floats = sum(each.is_floating_point() for each in source)
        for part in (slice(floats), slice(floats, None)):
            if source[part]:
                torch._foreach_copy_(target[part], source[part])


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether every number is finite, shape (). The largest absolute value passes NaN on."""
    floats = [each for each in tensors if each.is_floating_point()]
    return get_total_norm(floats, float("inf")).isfinite()
