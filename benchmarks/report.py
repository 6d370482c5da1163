"""CPU time of reading and drawing one long run.

    python benchmarks/report.py [--steps 200000] [--terms 4] [--steps-per-epoch 195] [--rounds 3]

A run folder with made-up weights and diagnostics is written to a temporary folder. Each part is
then timed: reading the folder, taking the median of its weights, drawing its weights.png, and a
whole report of it. The seconds are those of the process, not of the clock, so that other programs
do not count; each is the median of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import yaml

from grap_solo.diagnostics import diagnostic_names
from grap_solo.records.files import (
    CONFIG_FILE,
    DIAGNOSTICS_FILE,
    PICTURE_FILE,
    TERMS_FILE,
    WEIGHTS_FILE,
)
from grap_solo.records.runs import read_run
from grap_solo.records.weights import median_weights
from grap_solo.report.page import report
from grap_solo.report.plots import plot_weights
from grap_solo.report.tables import markdown

HELD = 0.01  # The share of steps that learn no weights.


def write_run(folder: Path, terms: Sequence[str], steps: int, per_epoch: int, seed: int) -> None:
    """Writes a run whose weights drift and whose cosines are noise."""
    generator = np.random.default_rng(seed)
    folder.mkdir()
    weights = np.abs(1 + generator.normal(0, 0.02, (steps, len(terms))).cumsum(axis=0))
    _write_steps(folder / WEIGHTS_FILE, terms, weights, per_epoch, [])
    names = diagnostic_names(terms)
    values = generator.uniform(-1, 1, (steps, len(names)))
    held = generator.uniform(size=steps) < HELD
    values[held] = np.nan
    causes = ["unlabelled" if each else "" for each in held]
    _write_steps(folder / DIAGNOSTICS_FILE, [*names, "skipped"], values, per_epoch, causes)
    content = {"weighting": "grap", "reference_weights": dict.fromkeys(terms, 1.0)}
    (folder / TERMS_FILE).write_text(yaml.safe_dump(content))
    config = {"seed": seed, "max_epochs": -(-steps // per_epoch)}
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(config))


def _write_steps(
    path: Path, names: Sequence[str], values: np.ndarray, per_epoch: int, texts: Sequence[str]
) -> None:
    def rows() -> Iterator[list[str]]:
        for step, numbers in enumerate(values.tolist()):
            cells = [str(step + 1), str(step // per_epoch), *(f"{each:.9g}" for each in numbers)]
            yield [*cells, texts[step]] if texts else cells

    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "epoch", *names])
        writer.writerows(rows())


def seconds(part: Callable[[], object], rounds: int) -> float:
    """The median CPU time of a part, in seconds."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            part()
        times.append(time.process_time() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--terms", type=int, default=4)
    parser.add_argument("--steps-per-epoch", type=int, default=195)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    terms = [f"term_{i + 1}" for i in range(given.terms)]
    with TemporaryDirectory() as parent:
        run = Path(parent) / f"grap-seed{given.seed}"
        write_run(run, terms, given.steps, given.steps_per_epoch, given.seed)
        record, picture = run / WEIGHTS_FILE, run / PICTURE_FILE
        parts: dict[str, Callable[[], object]] = {
            "reading the run": lambda: read_run(run),
            f"median of {WEIGHTS_FILE}": lambda: median_weights(record),
            f"drawing {PICTURE_FILE}": lambda: plot_weights(
                record, picture, dict.fromkeys(terms, 1.0)
            ),
            "a report of the run": lambda: report([run], Path(parent) / "report"),
        }
        rows = [[name, f"{seconds(part, given.rounds):.2f}"] for name, part in parts.items()]
    print(f"{given.steps} steps, {given.terms} terms, {given.steps_per_epoch} steps an epoch\n")
    print(markdown([["part", "CPU seconds"], *rows]))


if __name__ == "__main__":
    main()
