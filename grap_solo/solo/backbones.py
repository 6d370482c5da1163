"""Builds backbones of torchvision and timm by solo-learn's names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

from grap_solo.errors import ConfigError, unknown_name

RESNETS = ("resnet18", "resnet50")
"""The models that are torchvision's; all others are timm's."""

LOADED = ("pretrained", "weights", "checkpoint_path")
"""The arguments that load weights."""

DEFAULT_SIZE = 224


def build_backbone(
    name: str, dataset: str, kwargs: Mapping[str, Any], size: int | None = None
) -> tuple[nn.Module, int]:
    """Builds a backbone without classifier. Returns it and the dimension of its embedding.

    Args:
        name: ``resnet18`` or ``resnet50`` of torchvision, or any model name of timm.
        dataset: the dataset's name. For ``cifar10`` and ``cifar100`` a torchvision ResNet gets
            solo-learn's stem for small images: a 3x3 convolution of stride 1 and padding 2, and no
            max-pooling.
        kwargs: arguments of the model's constructor.
        size: see :func:`embedding_width`.

    Raises:
        ConfigError: see :func:`embedding_width`; or if weights to load cannot be had.
    """
    width = embedding_width(name, dataset, kwargs, size)
    loaded = [key for key in LOADED if kwargs.get(key)]
    try:
        model = _construct(name, dataset, kwargs)
    except Exception as error:
        if not loaded:
            raise
        raise ConfigError(
            f"backbone.kwargs.{loaded[0]}: the weights cannot be loaded ({_first_line(error)}): "
            "give pretrained_feature_extractor a file of weights instead"
        ) from None
    if name not in RESNETS and model.num_features != width:
        vars(model)["num_features"] = width  # solo-learn's base reads the dimension there.
    return model, width


def embedding_width(
    name: str, dataset: str, kwargs: Mapping[str, Any], size: int | None = None
) -> int:
    """The dimension of a backbone's embedding, from a trial without memory or computation.

    timm's ``num_features`` is not always that dimension: some models have a layer after it.

    Args:
        name: see :func:`build_backbone`.
        dataset: see :func:`build_backbone`.
        kwargs: see :func:`build_backbone`.
        size: the height and width of the images; None takes those that the model is made for.

    Raises:
        ConfigError: an unknown model, arguments that it does not take, images of a size that it
            does not take, or an output that is not one vector an image.
    """
    check_backbone(name)
    given = {key: value for key, value in kwargs.items() if key not in LOADED}
    return _try(name, dataset, json.dumps(given, default=str, sort_keys=True), size)


@lru_cache(maxsize=64)
def _try(name: str, dataset: str, arguments: str, size: int | None) -> int:
    kwargs = json.loads(arguments)
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                model = _construct(name, dataset, kwargs)
        except Exception as error:
            key = "backbone.kwargs" if kwargs else f"backbone.name: {name}"
            raise ConfigError(f"{key}: {_first_line(error)}") from None
        given = size or _own_size(model, kwargs)
        try:
            output: Any = model(torch.empty(2, 3, given, given, device="meta"))
        except Exception as error:
            raise _wrong_size(name, dataset, kwargs, given, error) from None
    if not isinstance(output, Tensor) or output.ndim != 2:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ConfigError(
            f"backbone.name: {name} with {kwargs} gives {found} for two images, not one vector "
            "for each: leave the arguments out, or give another backbone"
        )
    return int(output.shape[1])


def _construct(name: str, dataset: str, kwargs: Mapping[str, Any]) -> nn.Module:
    if name not in RESNETS:
        timms: nn.Module = timm.create_model(name, num_classes=0, **kwargs)
        return timms
    model: nn.Module = getattr(torchvision.models, name)(**kwargs)
    model.fc = nn.Identity()
    if dataset in ("cifar10", "cifar100"):
        model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
        model.maxpool = nn.Identity()
    return model


def _own_size(model: Any, kwargs: Mapping[str, Any]) -> int:
    """The size of the images that a model is made for."""
    size = kwargs.get("img_size")
    if size is None:
        size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (DEFAULT_SIZE,))
    return int(size[-1] if isinstance(size, list | tuple) else size)


def _wrong_size(
    name: str, dataset: str, kwargs: dict[str, Any], size: int, error: Exception
) -> ConfigError:
    """The error for a model that does not take images of a size."""
    fix = "give another augmentations crop_size or another backbone"
    if "img_size" not in kwargs:
        try:
            _try(name, dataset, json.dumps({**kwargs, "img_size": size}, sort_keys=True), size)
            fix = f"set +backbone.kwargs.img_size={size}"
        except ConfigError:
            pass
    return ConfigError(
        f"backbone.name: {name} does not take images of {size}x{size}, the augmentations' "
        f"crop_size ({_first_line(error)}): {fix}"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")


def check_backbone(name: str) -> str:
    """Returns the name if it is one of torchvision's ResNets or of timm's models.

    Raises:
        ConfigError: if it is not.
    """
    known = name in RESNETS or (timm.is_model(name) and "." not in name)  # A dot: a set of weights.
    if not known:
        raise unknown_name("backbone.name", name, {*RESNETS, *timm.list_models()})
    return name
