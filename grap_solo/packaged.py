"""Finds the project's own configuration files, in a clone as in an installed package."""

from __future__ import annotations

import difflib
from pathlib import Path

from grap_solo.errors import ConfigError


def find_configs() -> Path:
    """The folder of the configuration files: inside the package if a wheel has installed it, and
    beside the package in a clone."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.with_name("configs")


CONFIGS = find_configs()


def list_packaged() -> list[str]:
    """The names of all files, such as ``cifar10/grap``, in order."""
    files = CONFIGS.rglob("*.yaml")
    return sorted(file.relative_to(CONFIGS).with_suffix("").as_posix() for file in files)


def find_packaged(name: str) -> Path:
    """The file of a name.

    Args:
        name: such as ``cifar10/grap``, with or without ``.yaml``.

    Raises:
        ConfigError: no such file.
    """
    names = list_packaged()
    plain = name.removesuffix(".yaml")
    if plain not in names:
        near = difflib.get_close_matches(plain, names, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "grap-solo configs lists them"
        raise ConfigError(
            f"NAME: no packaged configuration '{name}' ({hint}): give a file of your own by "
            "--config-path DIR --config-name FILE"
        )
    return CONFIGS / f"{plain}.yaml"
