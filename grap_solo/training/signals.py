"""How a training ends before its end: a signal, or a machine that fails."""

from __future__ import annotations

import errno
import signal
from pathlib import Path
from types import FrameType

from lightning.pytorch import Trainer

from grap_solo.errors import RunStopped

AGAIN = "start it again, and it goes on from its newest checkpoint"
TERMINATED = 128 + signal.SIGTERM
"""The exit code of a process that SIGTERM has ended."""


def let_sigterm_wait_for_the_step(trainer: Trainer) -> None:
    """Has SIGTERM end a training after the step that it comes in, in all processes after the same.

    Lightning's own handler has a process tell the others at once. Where all of them get the signal,
    as SLURM and torchrun send it, that falls in between a step's own messages, and they crash or
    wait for ever. Here the first one takes note, and tells the others where Lightning has them ask:
    before each batch. With a handler that was there before, such as submitit's, the training goes
    on.

    Args:
        trainer: before it starts.
    """
    connector, loop = trainer._signal_connector, trainer.fit_loop.epoch_loop
    taken = signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, None)
    tell = loop._broadcast_sigterm_tensor
    asked = False

    def take_note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = not taken and trainer.is_global_zero
        if trainer.world_size == 1:
            connector.received_sigterm = asked

    def tell_others() -> None:
        connector.received_sigterm = asked
        tell()

    vars(connector)["_sigterm_notifier_fn"] = take_note
    vars(loop)["_broadcast_sigterm_tensor"] = tell_others


def in_words(error: Exception, directory: Path) -> Exception:
    """What ended a training, in words, if it was the machine; else the error itself.

    Args:
        error: what was raised.
        directory: the run's.
    """
    line = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "DataLoader worker" in line:
        return RunStopped(
            f"data.num_workers: a process that loads data has died ({line}): give it more memory "
            f"or fewer workers; {AGAIN}"
        )
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    if full or "PytorchStreamWriter failed" in line or "file write failed" in line:
        return RunStopped(
            f"checkpoint.dir: {directory} cannot be written to ({line}): make room; {AGAIN}"
        )
    return error
