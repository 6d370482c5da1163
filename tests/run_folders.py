"""Run folders written by hand: no training."""

import csv
import json
import math
from itertools import combinations

import torch
import yaml
from helpers import digits
from omegaconf import OmegaConf

from grap_solo.solo.backbones import build_backbone

FOUR = ("nnclr", "attn_nnclr", "byol", "barlow")
THREE = ("nnclr", "attn_nnclr", "feature")
EPOCHS, PER_EPOCH = 3, 4


def write_csv(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def steps():
    """Returns step and epoch of each row."""
    return [(step + 1, step // PER_EPOCH) for step in range(EPOCHS * PER_EPOCH)]


def write_run(
    folder, weights, *, seed=0, cosine=None, method=None, linear=None, dataset="digits",
    validations=None,
):  # fmt: skip
    """Writes a run with constant weights.

    Args:
        folder: where to.
        weights: by term.
        seed: the run's.
        cosine: if given, the run has diagnostics, in which every cosine is this number, except
            in the last epoch's first step, which was skipped.
        method: the method in ``result.json``.
        linear: the linear probe's accuracy; without it there is no ``result.json``.
        dataset: the data set in ``config.yaml``.
        validations: RankMe and the spread after each epoch; without them there is no
            ``metrics.csv``.
    """
    folder.mkdir(parents=True)
    config = {
        "name": folder.name,
        "seed": seed,
        "max_epochs": EPOCHS,
        "data": {"dataset": dataset},
        "weighting": {"name": "grap" if cosine is not None else "fixed"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [[*each, *weights.values()] for each in steps()]
    write_csv(folder / "weights.csv", ["step", "epoch", *weights], rows)
    if cosine is not None:
        names = ["alignment", *(f"alignment/{term}" for term in weights)]
        names += [f"norm/{term}" for term in weights]
        names += [f"gramian/{a}/{b}" for a, b in combinations(weights, 2)]
        rows = []
        for i, each in enumerate(steps()):
            skipped = i == (EPOCHS - 1) * PER_EPOCH
            values = [math.nan if skipped else cosine] * len(names)
            rows.append([*each, *values, "unlabelled" if skipped else ""])
        write_csv(folder / "diagnostics.csv", ["step", "epoch", *names, "skipped"], rows)
    if validations is not None:
        rows = []
        for epoch, measures in enumerate(validations):
            last = PER_EPOCH * (epoch + 1) - 1
            rows += [[0.5, epoch, last, "", ""], ["", epoch, last, *measures]]
        header = ["alignment", "epoch", "step", "val_rankme", "val_spread"]
        write_csv(folder / "metrics.csv", header, rows)
    if linear is not None:
        result = {
            "method": method,
            "seed": seed,
            "online": None,
            "linear": linear,
            "knn": linear - 5,
            "rankme": 20.0,
            "weights": weights,
            "seconds": 1.0,
        }
        (folder / "result.json").write_text(json.dumps(result))


def write_backbone_run(folder, name, dataset="digits", kwargs=None, size=32):
    """Writes the configuration and the checkpoint of a run whose backbone is untrained, with
    running statistics of its own. Returns the backbone, in eval mode.

    Args:
        folder: the run's.
        name: the backbone's.
        dataset: decides the stem of a ResNet.
        kwargs: of the backbone.
        size: of the images.
    """
    kwargs = kwargs or {}
    changes = [f"name={folder.name}", "++data.fraction=0.06"]  # One batch.
    cfg = digits(folder.parent, *changes, file="grap_vicreg")
    cfg.backbone, cfg.data.dataset = {"name": name, "kwargs": kwargs}, dataset
    for each in cfg.augmentations:
        each.crop_size = size
    torch.manual_seed(0)
    backbone, _ = build_backbone(name, dataset, kwargs, size)
    for key, value in backbone.state_dict().items():
        if key.endswith("running_mean"):
            value.uniform_(-0.1, 0.1)
        elif key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif key.endswith("gamma"):  # ConvNeXt's scale of a block is 1e-6 at first.
            value.fill_(0.5)
    (folder / "checkpoints").mkdir(parents=True)
    OmegaConf.save(cfg, folder / "config.yaml")
    state = {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
    state["projector.weight"] = torch.zeros(1)
    content = {"state_dict": state, "epoch": 0, "global_step": 1}
    torch.save(content, folder / "checkpoints" / f"{folder.name}-ep0.ckpt")
    return backbone.eval()
