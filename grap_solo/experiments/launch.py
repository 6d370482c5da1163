"""Runs of ``pretrain`` by hydra: one here, many as a multirun, or jobs on a SLURM cluster."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import grap_solo.compose  # noqa: F401 (adds configs/ to hydra's search path)
from grap_solo.errors import ConfigError, RunStopped, refusal
from grap_solo.extras import require
from grap_solo.records.files import expand_path

# Hydra makes no folders and no logs, as in solo-learn's files.
QUIET_HYDRA = {
    "hydra.output_subdir": "null",
    "hydra.run.dir": ".",
    "hydra/job_logging": "disabled",
    "hydra/hydra_logging": "disabled",
}

# For hydra's own folders, which are made before a run expands its paths.
OmegaConf.register_new_resolver("expand_path", expand_path, replace=True)


def launch(arguments: Sequence[str]) -> None:
    """Hands the command line to hydra, which trains once or once for each job of a multirun.

    Args:
        arguments: hydra's flags and overrides.

    Raises:
        ConfigError: the last job that was refused. Each earlier one has had a line on stderr.
    """
    refused: list[Exception] = []
    started = list(sys.argv)

    def job(cfg: DictConfig) -> None:
        sys.argv = started  # Lightning starts the processes of further devices with it.
        error = _train(cfg)
        if error is not None:
            refused.append(error)  # Raised below, since hydra would print lines of its own.

    given = [argument.lstrip("+") for argument in arguments]
    quiet = [
        f"{key}={value}"
        for key, value in QUIET_HYDRA.items()
        if not any(each.startswith(f"{key}=") for each in given)
    ]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of exiting.
    sys.argv = ["grap-solo pretrain", *arguments, *quiet]
    try:
        hydra.main(version_base="1.2", config_path=None)(job)()
    except MissingConfigException as failure:
        if "launcher/submitit" in str(failure):
            require("hydra/launcher", "slurm")
        raise
    except RuntimeError as failure:
        from_submitit = type(failure).__module__.startswith("submitit.")
        if not from_submitit and "on a slurm cluster" not in str(failure):
            raise
        raise ConfigError(f"hydra.launcher: {failure}") from None
    for error in refused[:-1]:
        print(refusal(error), file=sys.stderr)
    if refused:
        raise refused[-1]


def _train(cfg: DictConfig) -> Exception | None:
    """Trains one configuration and returns the error if it is refused.

    A job on a cluster raises the error instead, since the launcher brings it back to the
    submitting process, and prints it, for the job's log.
    """
    from grap_solo.training.run import pretrain

    # Exits at once: hydra's orderly shutdown would leave the job's other processes waiting.
    one_of_many = int(os.environ.get("SLURM_NTASKS", 1)) > 1
    try:
        pretrain(cfg)
    except (ConfigError, OmegaConfBaseException) as error:
        if HydraConfig.get().runtime.choices["hydra/launcher"] == "basic":
            return error
        print(refusal(error), file=sys.stderr, flush=True)
        if isinstance(error, RunStopped) and one_of_many:
            os._exit(2)
        raise ConfigError(str(error)) from None
    except Exception:
        if not one_of_many:
            raise
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    return None
