"""The extras of ``setup.cfg``: which packages each brings, and the line that names a missing one.

Only torch and numpy come with the package itself.
"""

from __future__ import annotations

from importlib.util import find_spec

from grap_solo.errors import ConfigError

EXTRAS: dict[str, tuple[str, ...]] = {
    "report": ("jinja2", "matplotlib", "omegaconf", "pandas", "scipy", "statsmodels", "yaml"),
    "train": (
        "PIL",
        "hydra",
        "lightning",
        "pyarrow",
        "pydantic",
        "pydantic_core",
        "safetensors",
        "sklearn",
        "timm",
        "torchjd",
        "torchmetrics",
        "torchvision",
    ),
    "search": ("optuna", "sqlalchemy"),
    "cagrad": ("torchjd", "cvxpy"),
    "onnx": ("onnx", "onnxscript"),
    "postgres": ("psycopg",),
    "slurm": ("hydra_plugins.hydra_submitit_launcher", "submitit"),
    "umap": ("umap",),
    "wandb": ("wandb",),
}
"""The modules of each extra. It also brings those of the extras in :data:`INCLUDED`."""

INCLUDED = {"train": "report", "search": "train"}
"""The extra that another one includes."""


def modules_of(extra: str) -> tuple[str, ...]:
    """All modules that an extra brings, those of the extras that it includes among them."""
    included = modules_of(INCLUDED[extra]) if extra in INCLUDED else ()
    return (*included, *EXTRAS[extra])


def is_installed(module: str) -> bool:
    """Whether a module can be imported. It is looked for, not imported."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # Its package is missing, or something forbids it.
        return False


def require(what: str, extra: str, *modules: str) -> None:
    """Refuses to go on if a package is missing.

    Args:
        what: the command, flag or key that needs the modules, for the error.
        extra: the extra that brings them.
        modules: which are needed; all of the extra's if none are given.

    Raises:
        ConfigError: some are not installed. It says what to install.
    """
    missing = [each for each in modules or modules_of(extra) if not is_installed(each)]
    if missing:
        named = f"{', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}"
        verb = "is" if len(missing) == 1 else "are"
        raise ConfigError(f'{what}: {named} {verb} not installed: pip install "grap-solo[{extra}]"')
