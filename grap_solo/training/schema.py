"""The schema of a configuration: one pydantic model for each of its blocks.

A field is the one home of its key's type, range, default and meaning. The keys of methods and of
weighting rules are declared next to their code, as :class:`~grap_solo.keys.Key`, and become fields
here. ``scripts/reference.py`` writes ``docs/configuration.md`` from these models.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from grap_solo.data import DATASETS, FORMATS
from grap_solo.errors import ConfigError
from grap_solo.keys import Key, missing_key, unknown_key
from grap_solo.methods import CompositeMethod
from grap_solo.methods.composite import CONFIG_KEYS
from grap_solo.solo.base import OPTIMIZERS, SCHEDULERS
from grap_solo.weighting import Weighting

A_BLOCK = "a block of keys"
NEAR_MISS = 0.85
"""How similar an unknown key must be to a known one to count as a misspelling."""


@dataclass(frozen=True)
class OneOf:
    """Restricts a field to some texts."""

    options: tuple[str, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.literal_schema(list(self.options))


def unfilled(**constraints: Any) -> Any:
    """A field that stays out of a configuration unless it is given: the base class, solo-learn's
    or ours, or the Trainer has its default."""
    return Field(default=None, exclude=True, **constraints)


def block(**constraints: Any) -> Any:
    """A field for a block of keys, checked and filled in even if the block is left out."""
    return Field(default_factory=dict, validate_default=True, **constraints)


class Block(BaseModel):
    """A block of keys. It may have further keys, as solo-learn's files do, unless such a key looks
    like a misspelling of a known one."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def refuse_near_misses(cls, given: Any) -> Any:
        """Refuses an unknown key that is almost a known one."""
        for key in given if isinstance(given, Mapping) else ():
            if key not in cls.model_fields and difflib.get_close_matches(
                str(key), cls.model_fields, n=1, cutoff=NEAR_MISS
            ):
                raise PydanticCustomError("near_miss", "near miss", {"key": key})
        return given


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
    train_path: str | None = Field(None, description="The training images: a folder or file.")
    val_path: str | None = Field(
        None, description="The validation images. Without them a run is not validated."
    )
    format: Annotated[str, OneOf(FORMATS)] = Field(
        "image_folder",
        description="How the images are stored: in folders (CIFAR: torchvision's own files) or in "
        "one Parquet file.",
    )
    no_labels: bool = Field(False, description="Whether to ignore the images' labels.")
    fraction: float = Field(
        -1, ge=-1, description="The share of the training images to use; -1 uses all."
    )
    num_workers: int = Field(4, ge=0, description="Processes that load images.")
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
    lr_decay_steps: list[Any] | None = unfilled(
        title="a list of epochs",
        description="`step` alone: the epochs at which the learning rate is divided by 10.",
    )


class Momentum(Block):
    base_tau: float | None = unfilled(
        ge=0, description="The momentum network's share of the past at the first step."
    )
    final_tau: float | None = unfilled(
        ge=0, description="The momentum network's share of the past at the last step."
    )
    classifier: bool | None = unfilled(
        description="Whether a second probe is trained on the momentum network."
    )


class Labels(Block):
    model_config = ConfigDict(extra="forbid")

    fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="The share of the training images whose labels are used; with `held_out`, the "
        "share that is held out, up to 0.5.",
    )
    split: Annotated[str, OneOf(("train", "held_out"))] = Field(
        "train",
        description="Which images have labels: `train`, images that the terms train on too; "
        "`held_out`, images that train the probe and steer the weights only.",
    )


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

    name: str = Field(description="The run's name and the name of its folder.")
    method: str = Field(
        description="The method: `all4one`, say, trains with the reference weights, `grap_all4one` "
        "with those of the `weighting` block; `package.module:Class` names a method of your own."
    )
    backbone: Backbone = block()
    data: Data = block()
    augmentations: Any = unfilled(
        title="a list of pipelines",
        description="solo-learn's augmentation pipelines, for two views in all.",
    )
    optimizer: Optimizer = block()
    scheduler: Scheduler = block()
    max_epochs: int = Field(ge=1, description="The epochs to train.")
    seed: int = Field(5, ge=0, description="The seed of everything random.")
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
    method_kwargs: Block = block()
    momentum: Momentum | None = unfilled()
    weighting: Block = block(exclude=True)
    labels: Labels = block()
    diagnostics: Block = block()
    performance: Performance = block()
    knn_eval: KnnEvaluation | None = unfilled()
    checkpoint: CheckpointBlock = block()
    wandb: Wandb = block()
    resume_from_checkpoint: str | None = Field(
        None, description="A checkpoint to resume. An interrupted run finds its own."
    )
    pretrained_feature_extractor: str | None = Field(
        None, description="A run's checkpoint from which the backbone starts."
    )


def schema_of(method: type[CompositeMethod], rule: type[Weighting]) -> type[Configuration]:
    """The model of a configuration that trains a method with a weighting rule.

    Its ``weighting`` block is without the rule's ``name``.
    """
    return create_model(
        "Configuration",
        __base__=Configuration,
        method_kwargs=(keys_model(method.all_keys()), block()),
        weighting=(keys_model(rule.keys, Strict), block(exclude=True)),
        diagnostics=(keys_model(CONFIG_KEYS["diagnostics"], Strict), block()),
        performance=(keys_model(CONFIG_KEYS["performance"], Performance), block()),
    )


class Strict(Block):
    """A block that may have no further keys."""

    model_config = ConfigDict(extra="forbid")


def keys_model(keys: Mapping[str, Key], base: type[Block] = Block) -> type[Block]:
    """The model of a block with these keys besides those of its base."""
    fields: dict[str, Any] = {name: _field_of(key) for name, key in keys.items()}
    model: type[Block] = create_model("Keys", __base__=base, **fields)
    return model


def check(model: type[Configuration], plain: dict[str, Any]) -> dict[str, Any]:
    """A configuration with its defaults filled in, without the keys that others fill in.

    Args:
        model: see :func:`schema_of`.
        plain: without nulls.

    Raises:
        ConfigError: an unknown or missing key, or a value that its key cannot take.
    """
    try:
        return model.model_validate(plain).model_dump()
    except ValidationError as error:
        raise _one_line(model, error) from None


def key_of(field: FieldInfo) -> Key:
    """The key that a field stands for."""
    given: dict[str, Any] = {}
    for each in field.metadata:
        if isinstance(each, Key):
            return each
        if isinstance(each, OneOf):
            given["choices"] = each.options
        for name, bound in (("least", "ge"), ("above", "gt"), ("most", "le"), ("below", "lt")):
            if hasattr(each, bound):
                given[name] = getattr(each, bound)
    kind = field.annotation
    if get_origin(kind) in (Union, types.UnionType):
        kind, *_ = get_args(kind)
    if get_origin(kind) is Annotated:
        kind, *more = get_args(kind)
        given["choices"] = next(each.options for each in more if isinstance(each, OneOf))
    assert isinstance(kind, type)
    return Key(kind, default=field.default, optional=True, doc=field.description or "", **given)


def _field_of(key: Key) -> tuple[Any, Any]:
    """A key's annotation and field for ``create_model``."""
    bounds: dict[str, Any] = {"ge": key.least, "gt": key.above, "le": key.most, "lt": key.below}
    limits: Any = Field(**{name: value for name, value in bounds.items() if value is not None})
    kind: Any = Annotated[key.kind, limits]
    if key.kind is dict:
        kind = dict[str, Annotated[float, limits]]
    elif key.choices:
        texts: Any = Annotated[str, OneOf(key.choices)]
        kind = texts if key.kind is str else texts | kind
    default = ... if key.required else key.default
    out = key.default is None and not key.required
    return Annotated[kind, key], Field(default, exclude=out, description=key.doc)


def _one_line(model: type[Configuration], error: ValidationError) -> ConfigError:
    """pydantic's first error in our words. A misspelled key comes first: others may follow from
    it."""
    unknown = ("near_miss", "extra_forbidden", "invalid_key")
    found = min(error.errors(), key=lambda each: each["type"] not in unknown)
    location, value = list(found["loc"]), found["input"]
    if found["type"] in ("extra_forbidden", "invalid_key"):
        value = location.pop()
    elif found["type"] == "near_miss":
        value = found["ctx"]["key"]
    node: Any = model
    field: FieldInfo | None = None
    path: list[str] = []
    while location and is_block(node):
        name = str(location.pop(0))
        field = node.model_fields[name]
        path.append(name)
        node = block_of(field)
    where = ".".join(path)
    if found["type"] in unknown:
        return unknown_key(where or "configuration", value, node.model_fields)
    if found["type"] == "missing":
        return missing_key(where)
    assert field is not None
    if found["type"] == "model_type" or field.title:
        return ConfigError(f"{where}: expected {field.title or A_BLOCK}, got {value!r}")
    key = key_of(field)
    if key.kind is dict and location:
        return key.item.error(value, f"{where}.{location[0]}")
    return key.error(value, where)


def block_of(field: FieldInfo) -> type[Block] | None:
    """The model of a field that is a block; None of any other field."""
    options = (field.annotation, *get_args(field.annotation))
    return next((each for each in options if is_block(each)), None)


def is_block(kind: Any) -> bool:
    """Whether a type is a block's model."""
    return isinstance(kind, type) and issubclass(kind, Block)
