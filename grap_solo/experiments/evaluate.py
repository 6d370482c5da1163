"""Evaluates a backbone, of a run or of any other origin: a table and ``evaluation.json``."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from grap_solo.data import Images, evaluation_loader, load_both, stop_workers, views_loader
from grap_solo.data.images import Part
from grap_solo.errors import ConfigError
from grap_solo.evaluation.offline import (
    ALL_MEASURES,
    device_of,
    embed,
    find_degenerate,
    measure_embeddings,
)
from grap_solo.evaluation.ranks import Degenerate, lidar
from grap_solo.experiments.retrain import finetune
from grap_solo.experiments.sources import Composer, Source, open_source
from grap_solo.extras import require
from grap_solo.records.files import (
    CONFIG_FILE,
    EVALUATION_FILE,
    TRAINED_FILE,
    make_folder,
    read_config,
    read_json,
    write_json,
)
from grap_solo.records.runs import counted
from grap_solo.report.tables import format_number, markdown

LIDAR_IMAGES, LIDAR_VIEWS = 1_000, 10
"""From how many images and views of each LiDAR is computed."""

UMAP_IMAGES = 10_000
"""The most images of a UMAP picture."""

HEADINGS = {
    "linear": "linear probe",
    "knn": "k-NN",
    "finetune": "fine-tuned",
    "rankme": "RankMe",
    "lidar": "LiDAR",
    "alpha_req": "alpha-ReQ",
}
"""The measures of ``evaluation.json``, and their names in the table."""

ACCURACIES = ("linear", "knn", "finetune")


def evaluate_source(
    name: str,
    load: Composer,
    wanted: Collection[str] = (),
    *,
    backbone: str | None = None,
    train: str | None = None,
    val: str | None = None,
    tune: bool = False,
    umap: Path | None = None,
    to: Path | None = None,
) -> dict[str, Any]:
    """Evaluates a backbone, prints a table and writes ``evaluation.json``.

    The file has what this call has measured. It is written into a run's folder, or beside a file of
    weights as ``<file>.evaluation.json``. A measure that the embeddings do not allow is null there,
    and its note says why.

    Args:
        name: see :func:`~grap_solo.experiments.sources.open_source`.
        load: composes a configuration file with the command line's overrides.
        wanted: some of the measures; all without one.
        backbone: see ``open_source``.
        train: see ``open_source``.
        val: see ``open_source``.
        tune: train the backbone further with the labels, as ``finetune`` does, and report its
            accuracy too.
        umap: the file for a picture of the validation embeddings in two dimensions.
        to: the folder for ``evaluation.json``.

    Returns:
        The content of ``evaluation.json``.

    Raises:
        ConfigError: nothing that can be opened, no images, or a package that is not installed.
    """
    if umap is not None:
        require("--umap", "umap")
    for folder in {each for each in (to, umap.parent if umap else None) if each is not None}:
        make_folder(folder, "--to" if folder == to else "--umap")
    source = open_source(name, backbone, load, train, val)
    if tune and source.run is None:
        raise ConfigError(
            f"--finetune: {name} is of no run: train with "
            "+pretrained_feature_extractor=FILE '+weighting={name: supervised}' instead"
        )
    try:
        found = _measure_source(source, set(wanted) or {*HEADINGS}, umap)
    finally:
        stop_workers()
    if tune:
        assert source.run is not None  # Refused above.
        found["finetune"] = _finetuned(source.run, load, found["notes"])
    else:
        found.pop("finetune", None)
    file = _file_for(source, to)
    print(_table_of_measures(found))
    if file is not None:
        write_json(file, found)
        print(f"\nfile: {file}")
    return found


def _measure_source(source: Source, wanted: set[str], umap: Path | None) -> dict[str, Any]:
    """Embeds the images and measures the embeddings."""
    cfg = source.cfg
    try:
        train_images, val_images = load_both(cfg.data, cfg.get("labels"))
    except ConfigError as error:
        if cfg.get("downstream") is None:
            raise
        raise ConfigError(
            f"{error}; evaluate needs the images' own labels, whatever the downstream heads learn"
        ) from None
    seen = copy.deepcopy(cfg)
    seen.data.dataset = source.seen
    device = device_of(cfg)
    network = source.backbone
    if source.run is not None and not cfg.performance.disable_channel_last:
        network = network.to(memory_format=torch.channels_last)  # As in training.
    train = embed(network, evaluation_loader(seen, train_images), device)
    validation = embed(network, evaluation_loader(seen, val_images), device)
    evaluation = asdict(measure_embeddings(train, validation, wanted & {*ALL_MEASURES}))
    notes: dict[str, str] = evaluation.pop("notes")
    if "lidar" in wanted:
        evaluation["lidar"] = None
        try:
            evaluation["lidar"] = _lidar_of(source, network, seen, train_images)
        except Degenerate as error:
            notes["lidar"] = str(error)
    if umap is not None:
        why = find_degenerate(validation[0])
        if why is None:
            _draw_umap(*validation, umap)
        else:
            notes["umap"] = f"not drawn: {why}"
    return {
        "source": source.name,
        "checkpoint": None if source.file is None else str(source.file),
        "backbone": source.backbone_name,
        "images": {"train": len(train_images), "validation": len(val_images)},
        "data": {key: cfg.data.get(key) for key in ("dataset", "train_path", "val_path")},
        **{key: evaluation.get(key) for key in HEADINGS if key in wanted},
        "regulariser": evaluation["regulariser"],
        "notes": notes,
        "versions": {each: version(each) for each in ("torch", "timm", "torchvision")},
    }


def _lidar_of(source: Source, network: nn.Module, cfg: DictConfig, images: Images) -> float:
    """Computes LiDAR from the views that the run trained on.

    Raises:
        Degenerate: the source has no training views, or the embeddings are not finite.
    """
    if source.run is None:
        raise Degenerate("the source has no training augmentations: give a run")
    if len(images) > LIDAR_IMAGES:
        drawn = np.random.default_rng(0).choice(len(images), LIDAR_IMAGES, replace=False)
        images = Part(images, drawn)
    found = embed_views(network, views_loader(cfg, images, LIDAR_VIEWS), device_of(cfg))
    why = find_degenerate(found.reshape(-1, found.shape[-1]))
    if why is not None:
        raise Degenerate(why)
    return lidar(found)


@torch.no_grad()
def embed_views(network: nn.Module, loader: Any, device: torch.device) -> np.ndarray:
    """Computes the embeddings (N, views, D) of a loader's views in eval mode."""
    network = network.to(device).eval()
    dtype = next(network.parameters()).dtype
    parts: list[Tensor] = []
    for _, views, _ in loader:
        found = [network(each.to(device, dtype)).float().cpu() for each in views]
        parts.append(torch.stack(found, 1))
    return torch.cat(parts).numpy()


def _finetuned(run: Path, load: Composer, notes: dict[str, str]) -> float | None:
    """Fine-tunes a run, unless that has been done, and returns the top-1 in percent."""
    folder = run.parent / f"{run.resolve().name}_finetuned"
    done = read_json(folder / TRAINED_FILE)
    if done is None:
        found = finetune(run, load)
        folder, accuracy = found.directory, found.accuracy
    else:
        accuracy = done["online"]
    epochs = read_config(folder / CONFIG_FILE).max_epochs
    before = ", trained before" if done else ""
    notes["finetune"] = f"{counted(epochs, 'epoch')}, in {folder}{before}"
    return accuracy


def _draw_umap(embeddings: np.ndarray, labels: np.ndarray, file: Path) -> None:
    """Draws embeddings (N, D) in two dimensions, coloured by label (McInnes et al. 2018)."""
    import matplotlib.pyplot as plt
    import umap

    embeddings, labels = embeddings[:UMAP_IMAGES], labels[:UMAP_IMAGES]
    places = umap.UMAP(random_state=0, n_jobs=1).fit_transform(embeddings)
    figure, axes = plt.subplots(figsize=(6, 6), layout="constrained")
    axes.scatter(
        places[:, 0],
        places[:, 1],
        c=labels,
        s=4,
        cmap="tab10" if labels.max() < 10 else "nipy_spectral",
    )
    axes.set(xticks=[], yticks=[], title=f"UMAP of {len(places)} validation embeddings")
    figure.savefig(file, dpi=150)
    plt.close(figure)
    print(f"picture: {file}")


def _file_for(source: Source, to: Path | None) -> Path | None:
    """The file for the measures; None for weights of timm's hub, which have no place of their
    own."""
    if to is not None:
        return to / EVALUATION_FILE
    if source.run is not None and source.name != str(source.file):
        return source.run / EVALUATION_FILE
    if source.file is None:
        return None
    if source.file.is_dir():
        return source.file / EVALUATION_FILE
    return source.file.with_name(f"{source.file.name}.{EVALUATION_FILE}")


def _table_of_measures(found: dict[str, Any]) -> str:
    """The measures as a table, with a line about what was measured."""
    images = found["images"]
    rows = [["measure", "value", "note"]]
    for key, heading in HEADINGS.items():
        if key not in found:
            continue
        note = found["notes"].get(key, "")
        if key == "linear" and found["regulariser"] is not None:
            note = f"C = {found['regulariser']:g}" + (f"; {note}" if note else "")
        unit = " %" if key in ACCURACIES and found[key] is not None else ""
        rows.append([heading, format_number(found[key], ".2f") + unit, note])
    about = (
        f"{found['source']}: {found['backbone']} on {images['train']} training and "
        f"{images['validation']} validation images"
    )
    text = f"{about}\n\n{markdown(rows)}"
    return text + (f"\n\nUMAP: {found['notes']['umap']}" if "umap" in found["notes"] else "")
