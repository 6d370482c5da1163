"""Trains on the digits for an hour and records the process's resources after each epoch.

    python benchmarks/soak.py DIRECTORY [--minutes 60] [key=value ...]

DIRECTORY/soak.csv has a row for each epoch: resident memory of the process and of its data workers,
in MiB, open file descriptors, threads, and the size of the run's folder. At the end, a table
compares the first tenth of the epochs with the last. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback

from grap_solo.cli import exit_on_refusal
from grap_solo.errors import RunStopped
from grap_solo.report.tables import markdown
from grap_solo.training.run import pretrain

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "digits"
COLUMNS = ("memory, MiB", "workers, MiB", "file descriptors", "threads", "folder, MiB")


def resident(process: str) -> float:
    """Reads a process's resident memory, in MiB."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Watch(Callback):
    """Writes a row after each epoch and its validation."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.start = directory, time.monotonic()
        self.rows: list[list[float]] = []
        with (directory / "soak.csv").open("w", newline="") as file:
            csv.writer(file).writerow(["epoch", "seconds", *COLUMNS])

    def on_train_epoch_end(self, trainer: Any, *args: Any) -> None:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        files = [each for each in self.directory.rglob("*") if each.is_file()]
        row = [
            trainer.current_epoch,
            time.monotonic() - self.start,
            resident("self"),
            sum(resident(child) for child in children),
            len(os.listdir("/proc/self/fd")),
            threading.active_count(),
            sum(each.stat().st_size for each in files) / 2**20,
        ]
        self.rows.append(row)
        with (self.directory / "soak.csv").open("a", newline="") as file:
            csv.writer(file).writerow([round(value, 2) for value in row])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--minutes", type=int, default=60)
    chosen, overrides = parser.parse_known_args()
    hours, minutes = divmod(chosen.minutes, 60)
    settings = [f"checkpoint.dir={chosen.directory}", "max_epochs=1000000", "name=run"]
    settings += [f"+max_time='00:{hours:02}:{minutes:02}:00'", "knn_eval.enabled=true"]
    settings += ["+enable_progress_bar=false", "data.num_workers=1", *overrides]
    with initialize_config_dir(str(CONFIGS), version_base="1.2"):
        cfg = compose("grap", settings)
    chosen.directory.mkdir(parents=True)
    watch = Watch(chosen.directory)
    with contextlib.suppress(RunStopped):  # By max_time.
        pretrain(cfg, [watch])

    tenth = max(1, len(watch.rows) // 10)
    first, last = (
        [median(column) for column in zip(*part, strict=True)]
        for part in (watch.rows[:tenth], watch.rows[-tenth:])
    )
    table = [["median of a tenth of the epochs", "first", "last", "growth"]]
    for name, a, b in zip(COLUMNS, first[2:], last[2:], strict=True):
        table.append([name, f"{a:.1f}", f"{b:.1f}", f"{b - a:+.1f}"])
    print(markdown(table))
    seconds = watch.rows[-1][1]
    print(f"\n{len(watch.rows)} epochs, {seconds / 60:.1f} minutes")


if __name__ == "__main__":
    with exit_on_refusal():
        main()
