"""The command line: one function for each of ``grap-solo``'s commands."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from omegaconf import DictConfig

USAGE = """\
usage: grap-solo pretrain --config-path DIR --config-name NAME [key=value ...]
           train one configuration; every flag and override of hydra's works
       grap-solo retrain RUN_DIR ... [--epochs FIRST LAST | --mean-last STEPS] [key=value ...]
           train from scratch with the median weights that runs have found
       grap-solo finetune RUN_DIR [key=value ...]
           train a run's backbone on with the labels, end to end
       grap-solo compare --config-path DIR --config-name NAME [methods=[...]] [seeds=[...]]
               [processes=N] [key=value ...]
           methods x seeds into one table with its pictures; goes on where it was stopped
       grap-solo search DIRECTORY --config-path DIR --config-name NAME [--trials N]
               [--sampler tpe|random] [--pruner none|median] [--seed N] [key=value ...]
           a search over the weights, beside GraP; goes on where it was stopped
       grap-solo report FOLDER ... [--output DIR]
           pictures and one HTML page of runs and comparisons
       grap-solo bench step [--batch N] [--rounds N] [--accelerator cpu|gpu]
               [--precision 32-true|bf16-mixed] [--method NAME] [--only NAME ...] [--json FILE]
           what a step of GraP costs beside plain training and others
       grap-solo bench terms [--batch N] [--rounds N] [--json FILE]
           how that grows with the number of terms
       grap-solo demo
           default, grap and grap_tuned on scikit-learn's digits, into runs/demo
       grap-solo run SCRIPT [arguments ...]
           run one of solo-learn's scripts with the grap_* methods among its own
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
        "finetune": _finetune,
        "compare": _compare,
        "search": _search,
        "report": _report,
        "bench": _bench,
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

    import grap_solo.compose  # noqa: F401 (hydra then finds what the files share)
    from grap_solo.errors import ConfigError

    refused: list[Exception] = []
    started = list(sys.argv)

    def job(cfg: DictConfig) -> None:
        sys.argv = started  # With which Lightning starts the processes of further devices.
        error = _train(cfg)
        if error is not None:
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
    try:
        hydra.main(version_base="1.2", config_path=None)(job)()
    except RuntimeError as failure:
        submitits = type(failure).__module__.startswith("submitit.")
        if not submitits and "on a slurm cluster" not in str(failure):
            raise
        raise ConfigError(f"hydra.launcher: {failure}") from None
    for error in refused[:-1]:  # Of a multirun: each job that was refused has its line.
        print(f"grap-solo: {' '.join(str(error).split())}", file=sys.stderr)
    if refused:
        raise refused[-1]


def _train(cfg: DictConfig) -> Exception | None:
    """Trains, and returns what that was refused for. In a job on a cluster that is raised, since
    the launcher brings it back, and printed, for the job's log."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf.errors import OmegaConfBaseException

    from grap_solo.errors import ConfigError, RunStopped
    from grap_solo.training.run import pretrain

    # hydra ends a process that failed well, and the others of its job would wait for it.
    one_of_many = int(os.environ.get("SLURM_NTASKS", 1)) > 1
    try:
        pretrain(cfg)
    except (ConfigError, OmegaConfBaseException) as error:
        if HydraConfig.get().runtime.choices["hydra/launcher"] == "basic":
            return error
        print(f"grap-solo: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
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


def _retrain(arguments: list[str]) -> None:
    from grap_solo.experiments.retrain import retrain

    parser = _Parser(prog="retrain")
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--epochs", nargs=2, type=int, metavar=("FIRST", "LAST"))
    parser.add_argument("--mean-last", type=int, metavar="STEPS")
    given = parser.parse_intermixed_args(arguments)
    if given.mean_last is not None and given.mean_last < 1:
        parser.error("argument --mean-last: expected 1 or more")
    runs, overrides = _runs_and_overrides("retrain", given.arguments)
    epochs = None if given.epochs is None else (given.epochs[0], given.epochs[1])
    retrain(runs, _loader(overrides), epochs, given.mean_last)


def _finetune(arguments: list[str]) -> None:
    from grap_solo.errors import ConfigError
    from grap_solo.experiments.retrain import finetune

    runs, overrides = _runs_and_overrides("finetune", arguments)
    if len(runs) > 1:
        raise ConfigError("finetune: give one run's folder")
    finetune(runs[0], _loader(overrides))


def _compare(arguments: list[str]) -> None:
    from grap_solo.errors import ConfigError
    from grap_solo.experiments.compare import compare
    from grap_solo.experiments.grid import read_grid

    given, overrides = _parse_overrides(_config_parser("compare"), arguments)
    cfg, grid = read_grid(
        _config_file(given), overrides, lambda path, changes: _loader(list(changes))(path)
    )
    for key in ("methods", "seeds"):
        if key not in grid:
            raise ConfigError(f"{key}: missing: add {key}=[...] to the command line or the file")
    if type(grid.get("processes", 1)) is not int or grid.get("processes", 1) < 1:
        raise ConfigError(
            f"processes: expected a whole number of 1 or more, got {grid['processes']!r}"
        )
    compare(cfg, **grid)


def _search(arguments: list[str]) -> None:
    from grap_solo.experiments.search import search

    parser = _config_parser("search")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--sampler", default="tpe")
    parser.add_argument("--pruner", default="none")
    parser.add_argument("--seed", type=int, default=0)
    given, overrides = _parse_overrides(parser, arguments)
    cfg = _loader(overrides)(_config_file(given))
    search(cfg, given.directory, given.trials, given.sampler, given.pruner, given.seed)


def _report(arguments: list[str]) -> None:
    from grap_solo.report.page import report

    parser = _Parser(prog="report")
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args(arguments)
    report(given.folders, given.output or given.folders[0] / "report")


def _bench(arguments: list[str]) -> None:
    from grap_solo.experiments.bench import bench_step, bench_terms, table_of_ratios
    from grap_solo.experiments.timing import AUTOCAST
    from grap_solo.records.files import write_json

    parser = _Parser(prog="bench")
    parser.add_argument("what", choices=("step", "terms"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--precision", choices=AUTOCAST, default="32-true")
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--method")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    for name in ("batch", "rounds"):
        if getattr(given, name) < 1:
            parser.error(f"argument --{name}: expected 1 or more")
    if given.what == "terms":
        found = bench_terms(batch_size=given.batch, rounds=given.rounds)
    else:
        found = bench_step(
            given.batch, given.rounds, given.accelerator, given.precision, given.only, given.method
        )
    print(table_of_ratios(found))
    if given.json is not None:
        write_json(given.json, found)


def _config_parser(command: str) -> _Parser:
    """A parser of hydra's two flags."""
    parser = _Parser(prog=command)
    parser.add_argument("--config-path", "-cp", type=Path, required=True)
    parser.add_argument("--config-name", "-cn", required=True)
    return parser


def _parse_overrides(parser: _Parser, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The parser's arguments, and hydra's overrides: those that have a ``=`` and are no flags."""
    overrides = [each for each in arguments if "=" in each and not each.startswith("-")]
    return parser.parse_args([each for each in arguments if each not in overrides]), overrides


def _config_file(given: argparse.Namespace) -> Path:
    """The file that the two flags name.

    Raises:
        ConfigError: there is none.
    """
    from grap_solo.errors import ConfigError

    path: Path = given.config_path
    if not path.is_dir():
        raise ConfigError(f"--config-path: no such folder '{path}': give the folder of the file")
    file = path / f"{given.config_name.removesuffix('.yaml')}.yaml"
    if not file.is_file():
        raise ConfigError(f"--config-name: no such file {file}: give the name of a file there")
    return file


class _Parser(argparse.ArgumentParser):
    """Whose errors are ours: one line."""

    def error(self, message: str) -> NoReturn:
        from grap_solo.errors import ConfigError

        raise ConfigError(f"{self.prog}: {message}")


def _runs_and_overrides(command: str, arguments: list[str]) -> tuple[list[Path], list[str]]:
    """The folders of runs and hydra's overrides, told apart by their ``=``."""
    from grap_solo.errors import ConfigError

    runs = [each for each in arguments if "=" not in each or Path(each).is_dir()]
    if not runs:
        raise ConfigError(f"{command}: give the folder of a run: grap-solo {command} RUN_DIR")
    return [Path(each) for each in runs], [each for each in arguments if each not in runs]


def _loader(overrides: list[str]) -> Callable[[Path], DictConfig]:
    """Composes a run's configuration file with the command line's changes."""
    from grap_solo.compose import compose

    return lambda file: compose(file, overrides)


def _demo(arguments: list[str]) -> None:
    from grap_solo.errors import ConfigError
    from grap_solo.experiments.demo import demo

    if arguments:
        raise ConfigError(f"demo: takes no arguments, got '{arguments[0]}'")
    demo(Path("runs/demo"))


def _run(arguments: list[str]) -> None:
    """Registers the methods, then hands over to the script as if it had been started itself."""
    from grap_solo.errors import ConfigError
    from grap_solo.solo import BASE, register_method

    if not arguments or not Path(arguments[0]).is_file():
        given = f"'{arguments[0]}'" if arguments else "nothing"
        raise ConfigError(f"run: expected one of solo-learn's scripts, got {given}")
    if BASE != "solo-learn":
        raise ConfigError("run: solo-learn's main branch cannot be imported: put it on PYTHONPATH")
    from grap_solo.methods import find_method  # Adds the methods to solo-learn's.

    for argument in arguments:  # A method of one's own, which no registry knows.
        key, _, path = argument.lstrip("+").partition("=")
        if key == "method" and ":" in path:
            register_method(path, find_method(path))
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    sys.exit(main())
