"""Measures memory and start-up of runs on CIFAR-10 at a time, with shared images and without.

    python benchmarks/shared_images.py [--runs 4] [--rounds 3] data.train_path=DIR data.val_path=DIR

In each round, one contender after the other starts `fixed` on as many seeds, with `data.batched`:

shared   grap-solo compare --parallel N: its runs map one file of decoded images
by hand  N processes of grap-solo pretrain: each decodes the images and keeps them

A contender is stopped once every run has written its first step. Its memory is the largest sum of
the proportional set sizes (PSS) of its processes until then: a page that several processes map is
counted once. Linux alone has them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from grap_solo.experiments.timing import ratio
from grap_solo.records.runs import counted
from grap_solo.report.tables import markdown

COMMAND = [sys.executable, "-m", "grap_solo"]
SECONDS_AT_MOST = 600


def commands_of(contender: str, runs: int, data: list[str]) -> list[list[str]]:
    """The commands of a contender, each of which is a process."""
    keys = [*data, "data.batched=True", "accelerator=cpu", "optimizer.batch_size=16"]
    keys += ["precision=32", "data.num_workers=0"]
    keys += ["method_kwargs.proj_hidden_dim=64", "method_kwargs.proj_output_dim=64"]
    # The weights of the first steps are written at the end of an epoch.
    keys += ["+limit_train_batches=2", "+limit_val_batches=1"]
    if contender == "shared":
        seeds = ",".join(map(str, range(1, runs + 1)))
        grid = ["methods=[fixed]", f"seeds=[{seeds}]", "name=grid", "--parallel", str(runs)]
        return [[*COMMAND, "compare", "cifar10/vicreg", *grid, *keys]]
    own = [*COMMAND, "pretrain", "cifar10/vicreg", *keys, "+enable_progress_bar=false"]
    return [[*own, f"seed={seed}", f"name=run-{seed}"] for seed in range(1, runs + 1)]


def processes_of(group: int) -> list[int]:
    """The processes of a group."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[2]) == group:
                found.append(int(folder.name))
    return found


def memory_of(group: int) -> int:
    """The proportional set size of a group's processes in KiB."""
    total = 0
    for process in processes_of(group):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
    return total


def measure(contender: str, runs: int, data: list[str]) -> tuple[float, float]:
    """Returns the seconds until each run has trained a step, and the memory until then in MiB.

    Raises:
        SystemExit: a process has ended before, or it takes too long; the output is printed.
    """
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "out").open("w") as out:
        began = time.perf_counter()
        started: list[subprocess.Popen[bytes]] = []
        for command in commands_of(contender, runs, data):
            started.append(
                subprocess.Popen(
                    command,
                    cwd=folder,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    process_group=started[0].pid if started else 0,
                )
            )
        group, most, seconds = started[0].pid, 0, 0.0
        try:
            while True:
                most = max(most, memory_of(group))
                seconds = time.perf_counter() - began
                written = [
                    each
                    for each in Path(folder).rglob("weights.csv")
                    if len(each.read_bytes().splitlines()) > 1
                ]
                if len(written) == runs:
                    return seconds, most / 1024
                if seconds > SECONDS_AT_MOST or any(each.poll() is not None for each in started):
                    sys.exit(f"{contender}: {Path(out.name).read_text()[-3000:]}")
                time.sleep(0.2)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            for each in started:
                each.wait()
            while processes_of(group):
                time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="+", help="keys that say where CIFAR-10 is: absolute paths")
    parser.add_argument("--runs", type=int, default=4, help="at a time")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    contenders = ("shared", "by hand")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(given.rounds):
        for name in contenders:
            found[name].append(measure(name, given.runs, given.data))
            seconds, memory = found[name][-1]
            print(f"{name}: {seconds:.1f} s, {memory:.0f} MiB", flush=True)
    rows = [["contender", "seconds to the first step of all", "MiB"]]
    for name, pairs in found.items():
        rows.append(
            [name, *(f"{statistics.median(each):.1f}" for each in zip(*pairs, strict=True))]
        )
    ratios = [["shared / by hand", "median", "least", "largest"]]
    for name, index in (("seconds", 0), ("MiB", 1)):
        one = ratio(*([pair[index] for pair in found[each]] for each in contenders))
        ratios.append([name, *(f"{one[key]:.2f}" for key in ("median", "min", "max"))])
    asked = f"{counted(given.runs, 'run')} at a time, {counted(given.rounds, 'round')}"
    print(f"\n{asked}\n\n{markdown(rows)}\n")
    print(markdown(ratios))


if __name__ == "__main__":
    main()
