"""The model card of an exported backbone, in the form of Hugging Face's hub."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig

import grap_solo
from grap_solo.exported import EXPORTED_STATE, EXPORTED_WEIGHTS, OWN_ENTRY
from grap_solo.records.files import EVALUATION_FILE, RESULT_FILE, TRAINED_FILE, WEIGHTS_FILE
from grap_solo.records.runs import counted, read_mapping, read_run
from grap_solo.records.weights import format_weight, median_weights
from grap_solo.report.tables import format_number, markdown

MEASURED = {
    "online": "online probe, top-1 in percent",
    "linear": "linear probe, top-1 in percent",
    "knn": "k-NN, top-1 in percent",
    "finetune": "fine-tuned, top-1 in percent",
    "rankme": "RankMe",
    "lidar": "LiDAR",
    "alpha_req": "alpha-ReQ",
}

LOADING = {
    "timm": 'import timm\n\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True).eval()',
    "torchvision": "from safetensors.torch import load_file\nfrom torchvision.models import {name}"
    '\n\nmodel = {name}()\nmodel.load_state_dict(load_file("FOLDER/{weights}"), strict=False)\n'
    "model.fc = torch.nn.Identity()",
    "own": 'import grap_solo\n\nmodel = grap_solo.load_backbone("FOLDER")',
    "state-dict": 'import torch\n\nstate = torch.load("FOLDER/{state}", weights_only=True)',
    "onnx": "import onnxruntime\n\n"
    'session = onnxruntime.InferenceSession("FOLDER/model.onnx")\n'
    'embeddings = session.run(None, {{"images": images}})[0]',
}
"""How the weights of each format are loaded; ``own`` is for a stem that torchvision lacks."""


def model_card(
    run: Path, saved: DictConfig, checkpoint: Path, config: dict[str, Any], form: str
) -> str:
    """Writes what the weights are: data, method, learned weights, metrics, command and versions.

    Args:
        run: the run's folder.
        saved: its ``config.yaml``.
        checkpoint: the checkpoint that was exported.
        config: the export's ``config.json``.
        form: the export's format.

    Raises:
        ConfigError: a damaged file of the run.
    """
    head = {
        "library_name": "timm" if form == "timm" else "grap-solo",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["self-supervised", "grap-solo", form],
    }
    recorded = read_run(run)
    rule = recorded.rule or "fixed"
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {run.resolve().name}",
        f"{saved.backbone.name}, pretrained on {saved.data.dataset} with "
        f"{saved.method} (weighting rule: {rule}) for {counted(saved.max_epochs, 'epoch')}, seed "
        f"{saved.get('seed', 5)}. The weights are those of `{checkpoint.name}`. The model computes "
        f"embeddings of {config['num_features']} numbers.",
        "## Use",
        _loading(config, form),
        _preprocessing(config),
        "## Weights of the terms",
        _weights_section(run, recorded.reference, saved),
        "## Metrics",
        _metrics(run),
        "## Training",
        "`training.yaml` is the run's configuration. With the paths of your images in it, "
        "this command trains it again:",
        "```sh\ngrap-solo pretrain --config-path FOLDER --config-name training name=again\n```",
        "Exported with "
        + ", ".join(
            [f"grap-solo {grap_solo.__version__}", f"torch {torch.__version__}"]
            + [f"{each} {version(each)}" for each in ("torchvision", "timm", "lightning")]
        )
        + ".",
    ]
    return "\n\n".join(parts) + "\n"


def _loading(config: dict[str, Any], form: str) -> str:
    block = config[OWN_ENTRY]
    small = form == "torchvision" and block["dataset"] in ("cifar10", "cifar100")
    text = LOADING["own" if small else form].format(
        name=block["backbone"], weights=EXPORTED_WEIGHTS, state=EXPORTED_STATE
    )
    if form == "torchvision" and not small:
        text = f"import torch\n{text}"
    also = '\n\n`grap_solo.load_backbone("FOLDER")` loads it too.'
    if form == "onnx" or small:
        also = ""
    return f"```python\n{text}\n```{also}"


def _preprocessing(config: dict[str, Any]) -> str:
    own = config["pretrained_cfg"]
    _, height, width = own["input_size"]
    numbers = [", ".join(f"{each:g}" for each in own[key]) for key in ("mean", "std")]
    return (
        f"Images: RGB, {height}x{width}, scaled to 0 to 1 and normalised with mean ({numbers[0]}) "
        f"and standard deviation ({numbers[1]})."
    )


def _weights_section(run: Path, reference: dict[str, float], saved: DictConfig) -> str:
    """The median of the effective weights beside the method's own."""
    file = run / WEIGHTS_FILE
    if not file.is_file():
        return "Not recorded."
    block = saved.get("weighting") or {}
    learned = median_weights(file, block.get("warmup_epochs") or 0)
    rows = [["term", "median weight", "reference weight"]]
    for term, weight in learned.items():
        rows.append([term, format_weight(weight), format_number(reference.get(term), "g")])
    return markdown(rows)


def _metrics(run: Path) -> str:
    """The measures that the run folder has, the newest file first."""
    found: dict[str, Any] = {}
    for name in (TRAINED_FILE, RESULT_FILE, EVALUATION_FILE):
        found |= {k: v for k, v in read_mapping(run / name).items() if v is not None}
    rows = [["measure", "value"]]
    rows += [[text, f"{found[key]:.2f}"] for key, text in MEASURED.items() if key in found]
    if len(rows) == 1:
        return "None measured: `grap-solo evaluate` measures a run before it is exported."
    return markdown(rows) + "\n\nOn the validation images; the ranks on the training images."
