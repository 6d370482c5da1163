"""The command line: ``grap-solo pretrain``, ``retrain`` and ``demo``."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

USAGE = """\
usage: grap-solo pretrain --config-path DIR --config-name NAME [key=value ...]
           train one configuration; every flag and override of hydra's works
       grap-solo retrain RUN_DIR [key=value ...]
           train from scratch with the median weights that a run has found
       grap-solo demo
           default, grap and grap_tuned on scikit-learn's digits, into runs/demo
       grap-solo run SCRIPT [arguments ...]
           run one of solo-learn's scripts with grap_all4one among its methods
"""

# As solo-learn's files have it: hydra makes no folders and logs of its own.
QUIET_HYDRA = {
    "hydra.output_subdir": "null",
    "hydra.run.dir": ".",
    "hydra/job_logging": "disabled",
    "hydra/hydra_logging": "disabled",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Bad input ends in one line on stderr and exit code 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[[list[str]], None]] = {
        "pretrain": _pretrain,
        "retrain": _retrain,
        "demo": _demo,
        "run": _run,
    }
    if not given or given[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if given else 2
    if given[0] not in commands:
        print(f"grap-solo: unknown command '{given[0]}'\n{USAGE}", end="", file=sys.stderr)
        return 2

    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from grap_solo.errors import ConfigError

    try:
        commands[given[0]](given[1:])
    except (ConfigError, HydraException, OmegaConfBaseException, YAMLError) as error:
        line = " ".join(str(error).split())
        print(f"grap-solo: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _pretrain(arguments: list[str]) -> None:
    """hydra's own main, with ``--config-path`` relative to the current folder."""
    import hydra
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    from grap_solo.errors import ConfigError
    from grap_solo.train import pretrain

    refused: list[Exception] = []

    started = list(sys.argv)

    def job(cfg: DictConfig) -> None:
        sys.argv = started  # With which Lightning starts the processes of further devices.
        try:
            pretrain(cfg)
        except (ConfigError, OmegaConfBaseException) as error:
            refused.append(error)  # Raised below: hydra would print lines of its own.

    for i, argument in enumerate(list(arguments)):
        flag, equals, value = argument.partition("=")
        if flag not in ("--config-path", "-cp", "--config-dir", "-cd"):
            continue
        if not equals:
            value = arguments[i + 1] if i + 1 < len(arguments) else ""
        if not Path(value).is_dir():
            raise ConfigError(f"{flag}: no such folder '{value}': give the folder of the file")
        absolute = str(Path(value).resolve())
        arguments[i if equals else i + 1] = f"{flag}={absolute}" if equals else absolute
    for key, value in QUIET_HYDRA.items():
        if not any(argument.lstrip("+").startswith(f"{key}=") for argument in arguments):
            arguments.append(f"{key}={value}")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Its errors come to main(), which prints one line.
    sys.argv = ["grap-solo pretrain", *arguments]
    hydra.main(version_base="1.2", config_path=None)(job)()
    if refused:
        raise refused[0]


def _retrain(arguments: list[str]) -> None:
    from hydra import compose, initialize_config_dir
    from omegaconf import DictConfig

    from grap_solo.errors import ConfigError
    from grap_solo.train import retrain

    if not arguments or "=" in arguments[0]:
        raise ConfigError("retrain: give the folder of a run: grap-solo retrain RUN_DIR")
    parent, overrides = Path(arguments[0]).resolve(), arguments[1:]

    def load(file: Path) -> DictConfig:
        with initialize_config_dir(str(file.parent), version_base="1.2"):
            return compose(file.name, overrides)

    retrain(parent, load)


def _demo(arguments: list[str]) -> None:
    from grap_solo.demo import demo
    from grap_solo.errors import ConfigError

    if arguments:
        raise ConfigError(f"demo: takes no arguments, got '{arguments[0]}'")
    demo(Path("runs/demo"))


def _run(arguments: list[str]) -> None:
    """Registers the methods, then hands over to the script as if it had been started itself."""
    import grap_solo.methods  # noqa: F401  (adds the methods to solo-learn's)
    from grap_solo.errors import ConfigError
    from grap_solo.solo import BASE

    if not arguments or not Path(arguments[0]).is_file():
        given = f"'{arguments[0]}'" if arguments else "nothing"
        raise ConfigError(f"run: expected one of solo-learn's scripts, got {given}")
    if BASE != "solo-learn":
        raise ConfigError("run: solo-learn's main branch cannot be imported: put it on PYTHONPATH")
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    sys.exit(main())
