"""Plans the runs of a comparison, and reads the file that describes one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from grap_solo.data import move_labelled_set
from grap_solo.errors import ConfigError, unknown_name
from grap_solo.experiments.tasks import SLURM_KEYS
from grap_solo.methods import weighted_name
from grap_solo.records.files import check_name, expand_path, read_config
from grap_solo.training.config import expand_paths, run_dir
from grap_solo.training.run import prepare_one_of_many
from grap_solo.weighting import WEIGHTINGS

CHILDREN = ("_tuned", "_tuned_weighted", "_scheduled", "_finetuned")
"""Suffixes of methods that start from another method's run."""
GRID_KEYS = ("methods", "seeds", "definitions", "launcher", "parallel", "gpus_per_run")


@dataclass(frozen=True)
class Cell:
    """One run of the comparison.

    Attributes:
        method: the method's name in the table.
        seed: the run's seed.
        cfg: the run's configuration, still without the weights or backbone of its parent.
        parent: the folder of the run that it starts from; None if it starts from scratch.
        suffix: the one of :data:`CHILDREN` that says how it starts from it; None likewise.
    """

    method: str
    seed: int
    cfg: DictConfig
    parent: Path | None
    suffix: str | None = None

    @property
    def directory(self) -> Path:
        return run_dir(self.cfg)


def plan(
    cfg: DictConfig, methods: Sequence[str], seeds: Sequence[int], definitions: Mapping[str, Any]
) -> list[Cell]:
    """Plans every run of a comparison, parents before their children.

    A parent is planned even if only its child was asked for.

    Raises:
        ConfigError: an unknown method, no methods or seeds, or a configuration that cannot be used.
    """
    for key, values in (("methods", methods), ("seeds", seeds)):
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise ConfigError(f"{key}: expected a list such as [a,b], got {values!r}")
    for seed in seeds:
        if type(seed) is not int or seed < 0:
            raise ConfigError(f"seeds: expected whole numbers of 0 or more, got {seed!r}")
    if not isinstance(definitions, Mapping):
        raise ConfigError(f"definitions: expected a block for each name, got {definitions!r}")
    check_name(str(cfg.name))
    for name in definitions:
        check_name(str(name), "definitions")
    wanted: dict[str, None] = {}
    for method in methods:
        root, _ = _root(str(method), definitions)
        wanted.update({root: None, str(method): None})
    ordered = sorted(wanted, key=lambda name: _root(name, definitions)[1] is not None)
    cells = []
    for method in ordered:
        root, suffix = _root(method, definitions)
        for seed in dict.fromkeys(seeds):
            mine = _configuration(cfg, root, seed, definitions)
            parent = None
            if suffix is not None:
                parent = run_dir(mine)
                if isinstance(mine.get("method"), str):  # A definition may give the plain name.
                    mine.method = weighted_name(mine.method)
                mine.weighting = {"name": "fixed"}
                if suffix == "_finetuned":
                    mine.weighting = {"name": "supervised"}
                    move_labelled_set(mine)
            mine.name = f"{method}-seed{seed}"
            prepare_one_of_many(mine, "a comparison")
            cells.append(Cell(method, seed, mine, parent, suffix))
    return cells


def _root(method: str, definitions: Mapping[str, Any]) -> tuple[str, str | None]:
    """Splits a name into the method that trains from scratch and a suffix of :data:`CHILDREN`; the
    suffix is None where there is none."""
    if method in definitions or method in WEIGHTINGS:
        return method, None
    for suffix in CHILDREN:
        root = method.removesuffix(suffix)
        if root == "supervised":
            continue  # It learns no weights, and has trained the backbone with the labels.
        if root != method and (root in definitions or root in WEIGHTINGS):
            return root, suffix
    names = {*definitions, *WEIGHTINGS}
    children = {f"{name}{suffix}" for name in names - {"supervised"} for suffix in CHILDREN}
    raise unknown_name("methods", method, names | children)


def _configuration(
    cfg: DictConfig, root: str, seed: int, definitions: Mapping[str, Any]
) -> DictConfig:
    """Makes a method's configuration: the common one, with the keys in which the method differs."""
    mine: Any = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    mine.pop("weighting", None)
    if isinstance(mine.get("method"), str):
        mine.method = weighted_name(mine.method)
    differs = definitions.get(root, {"weighting": {"name": root}})
    try:
        mine = OmegaConf.merge(mine, OmegaConf.create(differs))
    except (ValueError, TypeError):
        raise ConfigError(
            f"definitions.{root}: expected keys of a configuration, got {differs}"
        ) from None
    mine.seed, mine.name = seed, f"{root}-seed{seed}"
    mine = expand_paths(mine)
    runs = Path(OmegaConf.select(expand_paths(cfg), "checkpoint.dir", default="runs"))
    OmegaConf.update(mine, "checkpoint.dir", str(runs / str(cfg.name)), force_add=True)
    mine.enable_progress_bar = False
    return mine


def read_grid(
    file: Path, overrides: Sequence[str], load: Callable[[Path, Sequence[str]], DictConfig]
) -> tuple[DictConfig, dict[str, Any], list[str]]:
    """Reads the common configuration and the grid's keys from a grid's file, or from a
    configuration file and the command line.

    A grid's file has a ``base``, the path of a configuration file relative to its own, and may have
    ``overrides`` of the base, ``name``, ``methods``, ``seeds`` and ``definitions``, see
    :func:`~grap_solo.experiments.compare.compare`, and ``launcher``, ``parallel`` and
    ``gpus_per_run``, see :func:`~grap_solo.experiments.tasks.make_launcher`. For any other
    configuration file, these keys come from the command line.

    Args:
        file: the grid's file or a configuration file.
        overrides: the command line's: grid keys, or hydra's overrides of the base.
        load: composes a configuration file with overrides.

    Returns:
        the configuration, the grid's keys, and the settings of SLURM's jobs among the overrides.

    Raises:
        ConfigError: unknown keys in the grid's file, a base that does not exist, or an override of
            the ``weighting``, which each method sets itself.
    """
    for each in overrides:
        key = each.lstrip("+~").partition("=")[0]
        if key == "processes":
            raise _renamed(key)
        if key.partition(".")[0] == "weighting":
            raise ConfigError(
                f"{key}: each method of a comparison sets its own weighting: define one, such as "
                "'+definitions={mine: {weighting: {name: grap, lr_per_run: 1}}}', and add it to "
                "methods"
            )
    given = [each for each in overrides if each.lstrip("+").partition("=")[0] in GRID_KEYS]
    others = [each for each in overrides if each not in given]
    grid: Any = read_config(file)
    if "base" not in grid:
        others, settings = split_settings(others)
        grid, cfg = OmegaConf.create({}), load(file, others)
    else:
        valid = {"base", "overrides", "name", *GRID_KEYS}
        for key in grid:
            if key == "processes":
                raise _renamed(f"{file}: {key}")
            if key not in valid:
                raise unknown_name(str(file), key, valid)
        if not OmegaConf.is_list(grid.get("overrides", OmegaConf.create([]))):
            raise ConfigError(f"{file}: overrides: expected a list, got {grid.overrides!r}")
        base = file.parent / expand_path(str(grid.base))
        if not base.is_file():
            raise ConfigError(f"{file}: base: no such file {base}")
        named = [f"name={grid.name}"] if "name" in grid else []
        others, settings = split_settings([*named, *grid.get("overrides", []), *others])
        cfg = load(base, others)
    keys = OmegaConf.merge(grid, *(_read_grid_key(each.lstrip("+")) for each in given))
    container: Any = OmegaConf.to_container(keys, resolve=True)
    found = {key: container[key] for key in GRID_KEYS if container.get(key) is not None}
    return cfg, found, settings


def split_settings(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits overrides into those of a configuration and the settings of SLURM's jobs."""
    settings = [each for each in overrides if each.lstrip("+").startswith(SLURM_KEYS)]
    return [each for each in overrides if each not in settings], settings


def _renamed(where: str) -> ConfigError:
    return ConfigError(f"{where}: it is called parallel now: write parallel in its place")


def _read_grid_key(override: str) -> DictConfig:
    try:
        return OmegaConf.from_dotlist([override])
    except (YAMLError, OmegaConfBaseException) as error:
        key, _, value = override.partition("=")
        line = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise ConfigError(f"{key}: cannot read {value}: {line}") from None
