"""Times a small grid on the digits by the launcher against the same runs started by hand.

    python benchmarks/launcher.py [--minutes 60] [--epochs 5] [--seeds 2] [--workers 1 2]

In each round, all contenders train and evaluate `fixed` and `grap` with every seed, one contender
after the other, on one thread a run:

launcher, N  grap-solo compare --parallel N, with its measurement of costs, its table and its page
by hand, N   a shell loop of N branches with grap-solo pretrain and grap-solo evaluate for each run,
             two processes that each import everything

A worker's seconds beside its training are what a run costs over its training: imports, evaluation,
files, waiting for others, and the launcher's table, page and measurement of costs. They are the
seconds of all workers, less those that the runs' files say they trained, a run.

The rounds end when the minutes are over; there is at least one. A ratio divides two contenders'
seconds of the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from grap_solo.experiments.timing import ratio
from grap_solo.records.runs import counted
from grap_solo.report.tables import markdown

METHODS = {"fixed": "vicreg", "grap": "grap_vicreg"}
"""By name in the comparison, the file of configs/digits that trains the same."""

SHARED = ["accelerator=cpu", "scheduler.warmup_epochs=0"]
COMMAND = [sys.executable, "-m", "grap_solo"]


def run_quietly(command: list[str], folder: Path) -> float:
    """Runs a command on one thread and returns its seconds.

    Raises:
        SystemExit: it has failed; its output is printed.
    """
    began = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{shlex.join(command)}\n{done.stdout[-3000:]}")
    return time.perf_counter() - began


def training_of(files: Iterable[Path], runs: int) -> float:
    """Adds up the seconds of training in the runs' files, of which there must be ``runs``."""
    seconds = [json.loads(file.read_text())["seconds"] for file in files]
    assert len(seconds) == runs, f"{len(seconds)} runs have finished"
    return float(sum(seconds))


def by_launcher(workers: int, epochs: int, seeds: list[int]) -> tuple[float, float]:
    """Runs the grid as one comparison and returns its seconds, and those of its trainings."""
    names, numbers = ",".join(METHODS), ",".join(map(str, seeds))
    line = ["compare", "digits/vicreg", f"methods=[{names}]", f"seeds=[{numbers}]", "name=grid"]
    line += [*SHARED, f"max_epochs={epochs}", "--parallel", str(workers)]
    with tempfile.TemporaryDirectory() as folder:
        seconds = run_quietly([*COMMAND, *line], Path(folder))
        files = Path(folder).glob("runs/grid/*/result.json")
        return seconds, training_of(files, len(METHODS) * len(seeds))


def by_hand(branches: int, epochs: int, seeds: list[int]) -> tuple[float, float]:
    """Runs the grid by a shell loop and returns its seconds, and those of its trainings."""
    own = shlex.join(COMMAND)
    script = (
        f"{own} pretrain digits/$0 seed=$1 name=$0-$1 max_epochs={epochs} {' '.join(SHARED)} "
        "+enable_progress_bar=false && "
        f"{own} evaluate runs/$0-$1 --linear --knn accelerator=cpu"
    )
    runs = "\n".join(f"{file} {seed}" for file in METHODS.values() for seed in seeds)
    loop = f"echo {shlex.quote(runs)} | xargs -P {branches} -L 1 bash -c {shlex.quote(script)}"
    with tempfile.TemporaryDirectory() as folder:
        seconds = run_quietly(["bash", "-c", loop], Path(folder))
        evaluated = Path(folder).glob("runs/*/evaluation.json")
        files = [file.with_name("trained.json") for file in evaluated]
        return seconds, training_of(files, len(METHODS) * len(seeds))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60, help="start no round after these")
    parser.add_argument("--epochs", type=int, default=5, help="of every run")
    parser.add_argument("--seeds", type=int, default=2, help="how many")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    seeds = list(range(1, given.seeds + 1))
    contenders = {
        f"{name}, {number}": partial(grid, number, given.epochs, seeds)
        for number in given.workers
        for name, grid in (("launcher", by_launcher), ("by hand", by_hand))
    }
    runs = len(METHODS) * len(seeds)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    beside: dict[str, list[float]] = {name: [] for name in contenders}
    began = time.monotonic()
    while not times[next(iter(times))] or time.monotonic() - began < 60 * given.minutes:
        for name, grid in contenders.items():
            seconds, training = grid()
            times[name].append(seconds)
            workers = int(name.rpartition(" ")[2])
            beside[name].append((workers * seconds - training) / runs)
            print(f"{name}: {seconds:.1f} s", flush=True)
    rows = [["contender", "seconds, median", "seconds a run", "a worker's beside its training"]]
    for name, found in times.items():
        middle = statistics.median(found)
        own = statistics.median(beside[name])
        rows.append([name, f"{middle:.1f}", f"{middle / runs:.1f}", f"{own:.1f}"])
    rounds = counted(len(times[name]), "round")
    print(f"\n{runs} runs of {counted(given.epochs, 'epoch')}, {rounds}\n")
    print(markdown(rows))
    pairs = [(f"launcher, {each}", f"by hand, {each}") for each in given.workers]
    pairs += [(f"launcher, {each}", f"launcher, {given.workers[0]}") for each in given.workers[1:]]
    rows = [["ratio", "median", "least", "largest"]]
    for mine, other in pairs:
        found = ratio(times[mine], times[other])
        figures = [f"{found[key]:.2f}" for key in ("median", "min", "max")]
        rows.append([f"{mine} / {other}", *figures])
    print(f"\n{markdown(rows)}")


if __name__ == "__main__":
    main()
