"""Profiles one optimiser step of a contender of ``bench step`` with torch's profiler.

    python benchmarks/profile_step.py grap [--method all4one] [--batch 64] [--accelerator cpu]
        [--precision 32-true]

Prints the operators that take the most time by themselves, how many operators a step starts (each
is one or a few kernels on a GPU), and how often the host waits on a GPU: for a value, or for the
size of a masked selection.
"""

from __future__ import annotations

import argparse

from torch.profiler import ProfilerActivity, profile

from grap_solo.cli import exit_on_refusal
from grap_solo.experiments.bench import contender
from grap_solo.experiments.counting import count_operators


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("contender")
    parser.add_argument("--method", default="all4one")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--precision", default="32-true")
    chosen = parser.parse_args()
    mine = contender(
        chosen.contender, chosen.method, chosen.batch, chosen.accelerator, chosen.precision
    )
    for _ in range(2):
        mine.seconds()
    counted = count_operators(mine.seconds)
    gpu = mine.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    with profile(activities=activities) as found:
        mine.seconds()
    print(
        f"{chosen.method}, {chosen.contender}, batch {chosen.batch}, {chosen.precision}, "
        f"{mine.device.type}"
    )
    print(f"{counted.operators} operators, {len(counted.waits)} waits\n")
    averages = found.key_averages()
    attribute = "self_device_time_total" if gpu else "self_cpu_time_total"
    total = sum(getattr(each, attribute) for each in averages)
    rows = sorted(averages, key=lambda each: -getattr(each, attribute))[:20]
    print(f"{'operator':46} {'self, ms':>9} {'share':>6} {'calls':>6}")
    for each in rows:
        own = getattr(each, attribute)
        print(f"{each.key[:46]:46} {own / 1000:9.1f} {own / total:6.1%} {each.count:6}")


if __name__ == "__main__":
    with exit_on_refusal():
        main()
