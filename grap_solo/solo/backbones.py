"""Builds backbones of torchvision and timm by solo-learn's names."""

from __future__ import annotations

from typing import Any

import timm
import torchvision
from torch import nn

from grap_solo.errors import unknown_name


def build_backbone(name: str, dataset: str, kwargs: dict[str, Any]) -> tuple[nn.Module, int]:
    """Builds a backbone without classifier. Returns it and the dimension of its embedding.

    Args:
        name: ``resnet18`` or ``resnet50`` of torchvision, or any model name of timm.
        dataset: the dataset's name. For ``cifar10`` and ``cifar100`` a torchvision ResNet gets
            solo-learn's stem for small images: a 3x3 convolution of stride 1 and padding 2, and no
            max-pooling.
        kwargs: arguments of the model's constructor.

    Raises:
        ConfigError: if neither torchvision nor timm has the model.
    """
    if name in ("resnet18", "resnet50"):
        model = getattr(torchvision.models, name)(**kwargs)
        model.fc = nn.Identity()
        if dataset in ("cifar10", "cifar100"):
            model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
            model.maxpool = nn.Identity()
        return model, model.inplanes
    model = timm.create_model(check_backbone(name), num_classes=0, **kwargs)
    features: Any = model.num_features
    return model, int(features)


def check_backbone(name: str) -> str:
    """Returns the name if it is one of torchvision's ResNets or of timm's models.

    Raises:
        ConfigError: if it is not.
    """
    models = {"resnet18", "resnet50", *timm.list_models()}
    if name not in models:
        raise unknown_name("backbone.name", name, models)
    return name
