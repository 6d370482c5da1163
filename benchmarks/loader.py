"""Times the input pipelines in turns in one process, in images per second.

    python benchmarks/loader.py [--cifar10 DIR] [--device cuda] [--json FILE]

Each loader gives both views of an image; they count as one image:

solo-learn   solo-learn's transforms and DataLoader, if its main branch is on PYTHONPATH; the images
             are decoded in memory, as in torchvision's CIFAR10
one by one   the project's DataLoader on PIL images, with reproducible draws; a Parquet file's
             images are decoded when they are loaded
batched      grap_solo/data/batched.py

All load in this process, without workers. A ratio divides by the first loader's rate of the same
round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from grap_solo.cli import exit_on_refusal
from grap_solo.data import load_images, pretrain_loader
from grap_solo.data.batched import batched_loader
from grap_solo.data.datasets import Images
from grap_solo.data.sampling import EpochSampler

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def configuration(cifar10: Path | None, batch_size: int) -> DictConfig:
    """Makes the part of a run's configuration that the loaders read."""
    dataset = "digits" if cifar10 is None else "cifar10"
    kind = "cifar" if dataset.startswith("cifar") else dataset
    return OmegaConf.create(
        {
            "seed": 5,
            "accelerator": "cpu",
            "data": {
                "dataset": dataset,
                "format": "parquet",
                "train_path": None if cifar10 is None else str(cifar10),
                "no_labels": False,
                "fraction": -1,
                "num_workers": 0,
                "batched": False,
            },
            "optimizer": {"batch_size": batch_size},
            "augmentations": OmegaConf.load(CONFIGS / "augmentations" / f"asymmetric_{kind}.yaml"),
        }
    )


def solo_learns(cfg: DictConfig, images: Images) -> Any:
    """Makes solo-learn's loader of images decoded in memory; None without solo-learn."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from solo.data import pretrain_dataloader as solo
    except ImportError:
        return None
    finally:
        logging.disable(logging.NOTSET)
    each = [solo.build_transform_pipeline(cfg.data.dataset, entry) for entry in cfg.augmentations]
    crops = [entry.num_crops for entry in cfg.augmentations]
    samples = [images[index] for index in range(len(images))]

    class InMemory:
        """A dataset like torchvision's, of images decoded in memory."""

        def __init__(self, transform: Callable[..., Any]) -> None:
            self.transform = transform

        def __len__(self) -> int:
            return len(samples)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            image, label = samples[index]
            return self.transform(image), label

    transform = solo.prepare_n_crop_transform(each, num_crops_per_aug=crops)
    dataset = solo.dataset_with_index(InMemory)(transform)
    return solo.prepare_dataloader(dataset, cfg.optimizer.batch_size, num_workers=0)


def endless(loader: Any) -> Iterator[Any]:
    """Yields a loader's batches, epoch after epoch."""
    for epoch in itertools.count():
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        yield from loader


def images_per_second(batches: Iterator[Any], count: int, size: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return count * size / (time.perf_counter() - start)


def compare(loaders: dict[str, Any], size: int, count: int, rounds: int) -> list[dict[str, Any]]:
    """Measures each loader's rate, and its ratio to the first one's in the same round."""
    batches = {name: endless(loader) for name, loader in loaders.items()}
    for each in batches.values():
        next(each)
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(rounds):
        for name, each in batches.items():
            rates[name].append(images_per_second(each, count, size))
    base = next(iter(rates.values()))
    rows = []
    for name, found in rates.items():
        ratios = [rate / other for rate, other in zip(found, base, strict=True)]
        rows.append(
            {
                "loader": name,
                "threads": torch.get_num_threads(),
                "images_per_second": statistics.median(found),
                "ratio": statistics.median(ratios),
                "least": min(ratios),
                "most": max(ratios),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Formats the rates as a Markdown table."""
    lines = [
        "| threads | loader | images/s | ratio | least | most |",
        "|--------:|--------|---------:|------:|------:|-----:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['threads']} | {row['loader']} | {row['images_per_second']:,.0f} | "
            f"{row['ratio']:.2f} | {row['least']:.2f} | {row['most']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the input pipelines.")
    parser.add_argument("--cifar10", type=Path, metavar="DIR", help="train.parquet; else digits")
    parser.add_argument("--device", default="cpu", help="where the batched views are made")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--batches", type=int, default=3, help="of each loader in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="torch's")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()

    cfg = configuration(args.cifar10, args.batch_size)
    images = load_images(cfg.data, train=True)
    start = time.perf_counter()
    sampler = EpochSampler(len(images), cfg.seed)
    batched = batched_loader(cfg, images, sampler, drop_last=True, device=args.device)
    decoding = time.perf_counter() - start
    loaders = {
        "solo-learn": solo_learns(cfg, images),
        "one by one": pretrain_loader(cfg, images, args.batch_size),
        f"batched, {args.device}": batched,
    }
    loaders = {name: each for name, each in loaders.items() if each is not None}
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        rows += compare(loaders, args.batch_size, args.batches, args.rounds)
    print(f"{cfg.data.dataset}, batches of {args.batch_size}, {args.rounds} rounds;", end=" ")
    print(f"{len(images)} images decoded once in {decoding:.1f} s\n\n{table(rows)}")
    if args.json is not None:
        about = {
            "dataset": cfg.data.dataset,
            "batch_size": args.batch_size,
            "batches": args.batches,
            "rounds": args.rounds,
            "decoding_seconds": decoding,
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "torch": torch.__version__,
        }
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    with exit_on_refusal():
        main()
