"""Composes configuration files with hydra.

Importing this module adds ``configs/`` to the end of hydra's search path. A file in any folder can
then use what ours share (``/common/...``, ``augmentations``, ``wandb``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig

import grap_solo
from grap_solo.errors import ConfigError

CONFIGS = Path(grap_solo.__file__).parents[1] / "configs"
"""The folder of the project's own configuration files."""


class SharedConfigs(SearchPathPlugin):
    """Adds ``configs/`` to the end of hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if CONFIGS.is_dir():
            search_path.append(provider="grap-solo", path=f"file://{CONFIGS}")


Plugins.instance().register(SharedConfigs)


def compose(file: Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Composes a configuration file with hydra overrides.

    Args:
        file: a YAML file.
        overrides: such as ``max_epochs=2``.

    Raises:
        ConfigError: the file does not exist.
    """
    if not file.is_file():
        raise ConfigError(f"{file}: no such file")
    with hydra.initialize_config_dir(str(file.parent.resolve()), version_base="1.2"):
        return hydra.compose(file.name, list(overrides))
