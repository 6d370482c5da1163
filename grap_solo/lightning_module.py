"""The mixin with which a LightningModule of your own trains by ``balance``.

Needs torch alone: the trainer may be that of ``lightning`` or of ``pytorch_lightning``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from grap_solo.balance import HeldOut, SharedHead, Step, balance
from grap_solo.errors import ConfigError
from grap_solo.weighting import Weighting


class BalanceMixin:
    """Puts ``balance`` into a LightningModule of your own, before which it stands as a base::

        class MyMethod(BalanceMixin, LightningModule):
            def __init__(self):
                super().__init__()
                self.weighting = GraP(["reconstruction", "sparsity"])

            def training_step(self, batch, batch_idx):
                ...
                return self.balance_loss(embeddings, terms, downstream)

    It tells the weighting the run's length, its epochs and the optimiser's schedule, and logs the
    losses, the weights and the alignment. The weighting is a submodule, so a checkpoint holds what
    it has learned. Optimisation stays automatic: DDP, mixed precision, gradient clipping and
    accumulation work as in any module.

    A module that defines one of the hooks below calls the mixin's by ``super()``.

    Attributes:
        weighting: set it in ``__init__``, after ``super().__init__()``.
        last_step: the result of the last :meth:`balance_loss`; None before the first.
    """

    weighting: Weighting
    last_step: Step | None = None

    # Of the LightningModule that the class is mixed into.
    trainer: Any
    current_epoch: int
    log_dict: Callable[..., None]

    def balance_loss(
        self,
        embeddings: Tensor | Sequence[Tensor],
        terms: Callable[..., Mapping[str, Tensor]],
        downstream: Callable[..., Tensor],
        shared: SharedHead | None = None,
        held_out: HeldOut | None = None,
    ) -> Tensor:
        """Returns the scalar for ``training_step`` to return, and logs ``loss/<term>``,
        ``weight/<term>``, ``loss/downstream`` and, for a rule that takes gradients, ``alignment``.

        Args:
            embeddings: see :func:`~grap_solo.balance.balance`, as for all arguments.
            terms: computes the loss of each term.
            downstream: computes the downstream head's loss.
            shared: weights the gradients of a module that the terms share.
            held_out: a labelled batch to learn the weights from.

        Raises:
            ConfigError: see :func:`~grap_solo.balance.balance`.
        """
        step = balance(embeddings, terms, downstream, self.weighting, shared, held_out)
        found = {f"loss/{name}": value for name, value in step.losses.items()}
        found["loss/downstream"] = step.downstream
        weights = zip(self.weighting.terms, step.weights, strict=True)
        found |= {f"weight/{name}": value for name, value in weights}
        if step.alignment is not None:
            found["alignment"] = step.alignment.nan_to_num()
        self.log_dict(found)
        self.last_step = step
        return step.loss

    def on_train_start(self) -> None:
        """Tells the weighting the run's length.

        Raises:
            ConfigError: there is no ``weighting``, or its rule needs losses after each step, which
                only a method of ``grap-solo pretrain`` computes.
        """
        weighting = getattr(self, "weighting", None)
        if not isinstance(weighting, Weighting):
            raise ConfigError(
                f"{type(self).__name__}.weighting: set one in __init__, such as GraP(names)"
            )
        if weighting.needs_losses_after:
            raise ConfigError(
                f"weighting: {type(weighting).__name__} needs each batch's losses again after the "
                "optimiser's step: take another rule"
            )
        _call_next(self, "on_train_start")
        weighting.set_total_steps(count_batches(self.trainer))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Tells the weighting the epoch and the optimiser's schedule."""
        weighting = self.weighting
        if batch_idx == 0 and self.current_epoch:
            weighting.end_epoch()  # Not earlier: the last epoch's checkpoint is saved by now.
        weighting.train(self.current_epoch >= weighting.warmup_epochs)
        if weighting.follows_schedule:
            weighting.lr_factor = schedule_factor(self.trainer)
        skip: int | None = _call_next(self, "on_train_batch_start", batch, batch_idx)
        return skip


def _call_next(module: BalanceMixin, hook: str, *args: Any) -> Any:
    """Calls the hook of the classes after the mixin, of which a type checker knows none."""
    following = getattr(super(BalanceMixin, module), hook, None)
    return None if following is None else following(*args)


def count_batches(trainer: Any) -> float:
    """The batches of the whole run on each device, however it is cut; infinite without an end.

    A weighting learns from every batch, so gradient accumulation does not change their number.

    Args:
        trainer: a Lightning Trainer that has begun to train.
    """
    counts = [trainer.estimated_stepping_batches * trainer.accumulate_grad_batches]
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        counts.append(trainer.max_epochs * trainer.num_training_batches)
    return min(counts)


def schedule_factor(trainer: Any) -> float:
    """The learning rate of the optimiser's first group, as a share of its initial one."""
    group = trainer.optimizers[0].param_groups[0]
    factor: float = group["lr"] / group.get("initial_lr", group["lr"])
    return factor
