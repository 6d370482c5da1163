"""How a training ends before its end: a signal, or a machine that fails."""

from __future__ import annotations

import errno
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import NoReturn

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from grap_solo.errors import RunStopped

AGAIN = "start it again, and it goes on from its newest checkpoint"
TERMINATED = 128 + signal.SIGTERM
"""The exit code of a process that SIGTERM has ended."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a training as Ctrl-C does."""


class EndOnTerminate(Callback):
    """Has SIGTERM end a training as Ctrl-C does, in each process by itself.

    Lightning's own handler has processes tell each other from within whatever they are doing: when
    all of them get the signal, as SLURM and torchrun send it, they wait for each other for ever. A
    handler that was there before, such as submitit's, stays.
    """

    def __init__(self) -> None:
        self.before = signal.getsignal(signal.SIGTERM)
        self.terminated = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():  # Only there it can be set.
            default = self.before is signal.SIG_DFL
            signal.signal(signal.SIGTERM, self._terminate if default else self.before)

    def _terminate(self, number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # Again: what it is about to write would be cut.
        self.terminated = True
        raise Terminated


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
