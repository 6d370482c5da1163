"""The schema of a configuration: one pydantic model for each of its blocks.

A field is the one home of its key's type, range, default and meaning. The keys of methods and of
weighting rules are declared next to their code, as :class:`~grap_solo.keys.Key`, and become fields
here. ``scripts/reference.py`` writes ``docs/configuration.md`` from these models.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, create_model

from grap_solo.data import DATASETS, FORMATS
from grap_solo.methods import CompositeMethod
from grap_solo.methods.composite import CONFIG_KEYS
from grap_solo.methods.downstream import TASKS
from grap_solo.solo.optimizers import OPTIMIZERS, SCHEDULERS
from grap_solo.training.blocks import A_BLOCK, Block, OneOf, Strict, keys_model, nested, unfilled
from grap_solo.weighting import Weighting


class Backbone(Block):
    name: str = Field(description="A ResNet of torchvision's or any model of timm's.")
    kwargs: dict[str, Any] | None = unfilled(
        title=A_BLOCK, description="Arguments of the backbone's constructor."
    )


class Data(Block):
    dataset: Annotated[str, OneOf(DATASETS)] = Field(
        description="The data set. `digits` is scikit-learn's and needs no path; `custom` is a "
        "folder of images."
    )
    train_path: str | None = Field(
        None,
        description="The training images: a folder, a file, or a pattern of Parquet files. As in "
        "every path, `~` and `$VARIABLES` are replaced.",
    )
    val_path: str | None = Field(
        None, description="The validation images. Without them a run is not validated."
    )
    format: Annotated[str, OneOf(FORMATS)] = Field(
        "image_folder",
        description="How the images are stored: `image_folder`, in folders or listed in a CSV file "
        "(CIFAR: torchvision's own files); `parquet`, in Parquet files; or `huggingface`, in a "
        "dataset that `datasets` has saved to disk.",
    )
    image_key: str | None = Field(
        None,
        description="The column of the images; by default `img` or `image`, in a CSV file `file`.",
    )
    label_key: str | None = Field(None, description="The column of the labels; by default `label`.")
    no_labels: bool = Field(False, description="Whether to ignore the images' labels.")
    fraction: float = Field(
        -1, ge=-1, description="The share of the training images to use; -1 uses all."
    )
    num_workers: int = Field(4, ge=0, le=1024, description="Processes that load images.")
    batched: bool = Field(
        False,
        description="Whether to hold decoded images in memory and to make the views a batch at a "
        "time.",
    )
    download: bool = Field(True, description="Whether torchvision may download the data set.")
    num_classes: int | None = unfilled(
        ge=1, description="The number of classes; taken from the labels when left out."
    )


class Optimizer(Block):
    name: Annotated[str, OneOf(tuple(OPTIMIZERS))] = Field(description="The optimiser.")
    batch_size: int = Field(ge=1, description="Images of one step on each device.")
    lr: float = Field(
        gt=0,
        description="The learning rate for 256 images a step; multiplied by batch_size x devices x "
        "num_nodes / 256.",
    )
    classifier_lr: float = Field(
        gt=0,
        description="The online probe's learning rate. It is scaled like `lr` if there are "
        "validation images.",
    )
    weight_decay: float = Field(ge=0, description="The weight decay.")
    kwargs: dict[str, Any] = Field(
        {},
        title=A_BLOCK,
        description="Further arguments of the optimiser, by solo-learn's names (LARS: `momentum`, "
        "`eta`, `clip_lr`, `exclude_bias_n_norm`).",
    )
    exclude_bias_n_norm_wd: bool | None = unfilled(
        description="Whether biases and norms are not decayed."
    )


class Scheduler(Block):
    name: Annotated[str, OneOf(SCHEDULERS)] = Field(description="The learning rate schedule.")
    interval: Annotated[str, OneOf(("step", "epoch"))] = Field(
        "step", description="How often the learning rate changes."
    )
    warmup_epochs: float | None = unfilled(ge=0, description="Epochs of linear warm-up.")
    warmup_start_lr: float | None = unfilled(
        ge=0, description="The learning rate at the start of the warm-up. It is not scaled."
    )
    min_lr: float | None = unfilled(
        ge=0, description="The learning rate at the end of the cosine. It is not scaled."
    )
    lr_decay_steps: list[Annotated[int, Field(ge=0)]] | None = unfilled(
        title="a list of epochs",
        description="`step` alone: the epochs at which the learning rate is divided by 10.",
    )


class Momentum(Block):
    base_tau: float | None = unfilled(
        ge=0, le=1, description="The momentum network's share of the past at the first step."
    )
    final_tau: float | None = unfilled(
        ge=0, le=1, description="The momentum network's share of the past at the last step."
    )
    classifier: bool | None = unfilled(
        description="Whether a second probe is trained on the momentum network."
    )


class Labels(Strict):
    fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="The share of the labelled images whose labels are used; with `held_out`, the "
        "share that is held out, up to 0.5.",
    )
    split: Annotated[str, OneOf(("train", "held_out"))] = Field(
        "train",
        description="Which images have labels: `train`, images that the terms train on too; "
        "`held_out`, images that train the probe and steer the weights only.",
    )
    path: str | None = Field(
        None,
        description="A labelled set of its own, which trains the probe and steers the weights: a "
        "folder of class folders, or a file. `data.train_path` then needs no labels, and "
        "`fraction` counts in this set, up to 1.",
    )
    val_path: str | None = Field(
        None,
        description="Labelled images to validate on. By default those of `data.val_path`, unless "
        "`data.no_labels` is set.",
    )


class Downstream(Strict):
    """One entry of the ``downstream`` block."""

    task: Annotated[str, OneOf(tuple(TASKS))] = Field(
        description="What the head learns: `classification`, by cross-entropy; `regression`, by "
        "the mean squared error of targets standardised by the training targets; or `multi_label`, "
        "by binary cross-entropy."
    )
    column: str | None = Field(
        None,
        description="The column of the targets. A regression's are numbers. Without it a "
        "classification learns the images' own labels.",
    )
    columns: Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        title="a list of columns",
        description="`multi_label` alone: a column of 0 and 1 for each label.",
    )
    weight: float = Field(1.0, gt=0, description="The weight of the head's loss in their sum.")


class Performance(Block):
    disable_channel_last: bool = Field(
        False, description="Whether tensors stay in torch's default memory format."
    )


class CheckpointBlock(Block):
    enabled: bool = Field(True, description="Whether to write checkpoints.")
    dir: str = Field("runs", description="The folder of all runs; a run is in `dir`/`name`.")
    frequency: int = Field(1, ge=1, description="Epochs between two checkpoints.")
    keep_prev: bool = Field(False, description="Whether to keep earlier checkpoints.")


class KnnEvaluation(Block):
    enabled: bool | None = unfilled(description="Whether to evaluate an online k-NN.")
    k: int | None = unfilled(ge=1, description="The number of neighbours.")
    distance_func: Annotated[str, OneOf(("euclidean", "cosine"))] | None = unfilled(
        description="The distance between embeddings."
    )


class Wandb(Block):
    enabled: bool = Field(False, description="Whether to log to W&B besides the CSV files.")
    entity: str | None = Field(None, description="The W&B user or team.")
    project: str = Field("grap-solo", description="The W&B project.")
    offline: bool = Field(False, description="Whether W&B writes to the run's folder only.")


class Configuration(Block):
    """The first level. Any other argument of Lightning's Trainer may stand here too."""

    name: str = Field(
        description="The run's name and the name of its folder: no path, 230 bytes at most."
    )
    method: str = Field(
        description="The method. A plain name trains with the reference weights, a name with "
        "`grap_` before it with those of the `weighting` block; `package.module:Class` names a "
        "method of your own."
    )
    backbone: Backbone = nested()
    data: Data = nested()
    augmentations: Any = unfilled(
        title="a list of pipelines",
        description="solo-learn's augmentation pipelines, for two views in all.",
    )
    optimizer: Optimizer = nested()
    scheduler: Scheduler = nested()
    max_epochs: int = Field(ge=1, description="The epochs to train.")
    seed: int = Field(5, ge=0, le=2**32 - 1, description="The seed of everything random.")
    accelerator: str = Field("auto", description="The Trainer's accelerator: `cpu`, `gpu`, `auto`.")
    devices: Any = Field(
        1,
        title="a number, or a list such as [0]",
        description="The number of devices, or their indexes.",
    )
    num_nodes: int = Field(1, ge=1, description="The number of machines.")
    strategy: str | None = Field(
        None, description="The Trainer's strategy. A single device needs none."
    )
    sync_batchnorm: bool | None = unfilled(
        description="Whether batch-norms normalise by the joined batch; for GPUs only."
    )
    precision: (
        Annotated[
            str,
            OneOf(("32-true", "64-true", "16-mixed", "bf16-mixed", "32", "64", "16", "bf16")),
            BeforeValidator(str),
        ]
        | None
    ) = unfilled(description="The Trainer's precision.")
    accumulate_grad_batches: int | None = unfilled(
        ge=1, description="Batches whose gradients are added up for one optimiser step."
    )
    enable_progress_bar: bool | None = unfilled(description="Whether to show a progress bar.")
    method_kwargs: Block = nested()
    momentum: Momentum | None = unfilled()
    weighting: Block = nested(exclude=True)  # The rule itself fills in its defaults.
    labels: Labels = nested()
    downstream: Annotated[dict[Any, Downstream], Field(min_length=1)] | None = Field(
        None, title="a block of one head or more"
    )
    diagnostics: Block = nested()
    performance: Performance = nested()
    knn_eval: KnnEvaluation | None = unfilled()
    checkpoint: CheckpointBlock = nested()
    wandb: Wandb = nested()
    resume_from_checkpoint: str | None = Field(
        None, description="A checkpoint to resume. An interrupted run finds its own."
    )
    pretrained_feature_extractor: str | None = Field(
        None,
        description="A file of weights from which the backbone starts: a checkpoint of ours or of "
        "another tool, or a state dict.",
    )


@lru_cache(maxsize=64)
def schema_of(method: type[CompositeMethod], rule: type[Weighting]) -> type[Configuration]:
    """The model of a configuration that trains a method with a weighting rule.

    Its ``weighting`` block is without the rule's ``name``.
    """
    return create_model(
        "Configuration",
        __base__=Configuration,
        method_kwargs=(keys_model(method.all_keys()), nested()),
        weighting=(keys_model(rule.keys, Strict), nested(exclude=True)),
        diagnostics=(keys_model(CONFIG_KEYS["diagnostics"], Strict), nested()),
        performance=(keys_model(CONFIG_KEYS["performance"], Performance), nested()),
    )
