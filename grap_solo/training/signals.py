"""Early ends of a training: a signal, or a failure of the machine."""

from __future__ import annotations

import errno
import signal
from pathlib import Path
from types import FrameType

from lightning.pytorch import Trainer

from grap_solo.errors import RunStopped

AGAIN = "start it again to resume from its newest checkpoint"
TERMINATED = 128 + signal.SIGTERM
"""The exit code of a process that SIGTERM ends."""


def end_after_step_on_sigterm(trainer: Trainer) -> None:
    """Makes SIGTERM end a training after the current step, at the same step in every process.

    SLURM and torchrun send the signal to every process. Lightning's own handler then has each
    process tell the others at once, in the middle of a step's own communication, and they crash or
    deadlock. Here the first process only notes the signal. It tells the others before the next
    batch, where Lightning synchronises them anyway.

    If another handler was installed before, such as submitit's, the training continues.

    Args:
        trainer: before it starts.
    """
    connector, loop = trainer._signal_connector, trainer.fit_loop.epoch_loop
    handled_elsewhere = signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, None)
    tell = loop._broadcast_sigterm_tensor
    noted = False

    def note_signal(number: int, frame: FrameType | None) -> None:
        nonlocal noted
        noted = not handled_elsewhere and trainer.is_global_zero
        if trainer.world_size == 1:
            connector.received_sigterm = noted

    def tell_others() -> None:
        connector.received_sigterm = noted
        tell()

    vars(connector)["_sigterm_notifier_fn"] = note_signal
    vars(loop)["_broadcast_sigterm_tensor"] = tell_others


def explain_machine_failure(error: Exception, directory: Path) -> Exception:
    """Turns a failure of the machine into an error that says what to do.

    Args:
        error: the error that ended a training.
        directory: the run's folder.

    Returns:
        a :class:`~grap_solo.errors.RunStopped` for a failure of the machine; else the error itself.
    """
    line = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "DataLoader worker" in line:
        return RunStopped(
            f"data.num_workers: a process that loads data has died ({line}): give it more memory "
            f"or use fewer workers; {AGAIN}"
        )
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    if full or "PytorchStreamWriter failed" in line or "file write failed" in line:
        return RunStopped(
            f"checkpoint.dir: {directory} cannot be written to ({line}): make room; {AGAIN}"
        )
    return error
