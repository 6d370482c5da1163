"""Estimates what a grid of runs costs before it is started: time, bytes, files and messages.

    python benchmarks/estimate.py configs/table3/imagenet100.yaml --images 126689 --rate 3000
        [--validation 5000] [--gpus 1 8 64] [--cores-per-gpu 8] [--image-bytes 110000]
        [--decode-rate 90]

Counted: runs, steps and images from the grid's configuration; parameters, a checkpoint's bytes and
the messages of a step from the model, built on no device; operations by torch's FLOP counter. Given
by you: a GPU's images a second for this method (``grap-solo bench step`` prints it), and how many
images a second one core decodes into two views (measured here, on two photographs, if left out).
"""

from __future__ import annotations

import argparse
import io
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.flop_counter import FlopCounterMode

from grap_solo.cli import exit_on_refusal
from grap_solo.compose import compose
from grap_solo.data.augmentations import build_views
from grap_solo.data.datasets import NUM_CLASSES
from grap_solo.experiments.grid import plan, read_grid
from grap_solo.methods import find_method
from grap_solo.records.runs import counted
from grap_solo.training.config import prepare

PHOTOGRAPH = (500, 375)
"""The size of the photographs, that of most of ImageNet."""


def build(cfg: DictConfig) -> Any:
    """Builds a run's model."""
    cfg = prepare(cfg)
    cfg.data.num_classes = NUM_CLASSES.get(cfg.data.dataset, cfg.data.get("num_classes", 10))
    return find_method(cfg.method)(cfg)


def count_operations(model: Any, size: int) -> float:
    """Operations of one training step for each image: the backbone forward and backward on two
    views, and the momentum backbone forward. Heads are left out."""
    views = torch.randn(2, 3, size, size)  # Two views of one image.
    with FlopCounterMode(display=False) as counter:
        model.backbone(views).sum().backward()
        if hasattr(model, "momentum_backbone"):
            with torch.no_grad():
                model.momentum_backbone(views)
    return float(counter.get_total_flops())


def measure_decoding(cfg: DictConfig, seconds: float = 5.0) -> tuple[float, float]:
    """Images a second that one core decodes into their views, and the mean bytes of an image."""
    torch.set_num_threads(1)
    files = []
    for pixels in load_sample_images().images:
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize(PHOTOGRAPH).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    views = build_views(cfg.data.dataset, cfg.augmentations)
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        image = Image.open(io.BytesIO(files[done % len(files)])).convert("RGB")
        for make in views:
            make(image)
        done += 1
    return done / (time.perf_counter() - began), float(np.mean([len(each) for each in files]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("grid", type=Path)
    parser.add_argument("--images", type=int, required=True, help="training images")
    parser.add_argument("--validation", type=int, default=5000, help="validation images")
    parser.add_argument("--rate", type=float, required=True, help="a GPU's images a second")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--cores-per-gpu", type=int, default=8)
    parser.add_argument("--image-bytes", type=float)
    parser.add_argument("--decode-rate", type=float)
    given = parser.parse_args()
    cfg, keys, _ = read_grid(given.grid, [], compose)
    cells = plan(cfg, keys["methods"], keys["seeds"], keys.get("definitions", {}))
    ready = prepare(cells[0].cfg)
    batch, epochs = ready.optimizer.batch_size, ready.max_epochs
    steps = given.images // batch * epochs
    model = build(cells[0].cfg)
    size = ready.augmentations[0].crop_size
    rate, stored = measure_decoding(ready)
    rate, stored = given.decode_rate or rate, given.image_bytes or stored
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    state = sum(each.numel() * each.element_size() for each in model.state_dict().values())
    checkpoint = state + 4 * trained  # LARS keeps one momentum for each parameter.
    terms = len(model.weighting.terms)
    grid = f"{counted(len(cells), 'run')} of {counted(epochs, 'epoch')}"
    print(f"{grid}, {given.images} images, batch {batch}\n")
    print(f"steps of a run:                        {steps:,}")
    print(f"operations of an image, backbone:      {count_operations(model, size) / 1e9:.1f} GFLOP")
    print(f"bytes read by a run:                   {epochs * given.images * stored / 1e12:.2f} TB")
    print(f"bytes of the images, kept in memory:   {given.images * stored / 1e9:.1f} GB")
    print(f"a checkpoint:                          {checkpoint / 1e6:.0f} MB")
    print(f"the newest checkpoint of every run:    {len(cells) * checkpoint / 1e9:.1f} GB")
    print(f"gradients that DDP sums in a step:     {4 * trained / 1e6:.1f} MB")
    print(f"what GraP sums in a step:              {4 * (terms * terms + terms + 2)} bytes")
    print(f"images a second of a core, two views:  {rate:.0f}")
    print(f"cores that keep a GPU busy:            {given.rate / rate:.0f}")
    fed = min(given.rate, given.cores_per_gpu * rate)
    said = "its cores" if fed < given.rate else "the GPU"
    print(f"limit, with {given.cores_per_gpu} cores for each GPU:     {said}, {fed:.0f} images/s\n")
    hours = epochs * (given.images + given.validation / 2) / fed / 3600
    print(f"| GPUs | hours | read from the store, MB/s |\n|{'---:|' * 3}")
    children = sum(cell.parent is not None for cell in cells)  # They start after the others.
    for count in given.gpus:
        waves = math.ceil((len(cells) - children) / count) + math.ceil(children / count)
        busy = min(count, len(cells))
        print(f"| {count} | {waves * hours:,.0f} | {busy * fed * stored / 1e6:,.0f} |")
    print(f"\nOne run: {hours:.1f} hours. Runs are not divided: from {len(cells)} GPUs on, more of "
          "them help only with devices=N for each run.")  # fmt: skip


if __name__ == "__main__":
    with exit_on_refusal():
        main()
