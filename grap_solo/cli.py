"""The command line: a function for each of ``grap-solo``'s commands.

Help and refusals answer at once: torch, hydra and the commands' own modules are imported only after
the command line has been checked.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grap_solo import __version__
from grap_solo.arguments import build_parser
from grap_solo.errors import ConfigError, is_machine_failure, refusal
from grap_solo.extras import require
from grap_solo.packaged import find_packaged, list_packaged

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from grap_solo.experiments.tasks import Launcher


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Bad input ends in one line on stderr and exit code 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser, commands = build_parser()
    if given == ["--version"]:
        print(f"grap-solo {__version__}")
        return 0
    if not given or given[0] in ("-h", "--help", "help"):
        parser.print_help()
        return 0 if given else 2
    try:
        if given[0] not in commands:
            raise unknown_command(given[0], commands)
        parsed = commands[given[0]].parse(given[1:])
        extra = EXTRA_OF.get(given[0], "train")
        if extra:
            require(given[0], extra)
        COMMANDS[given[0]](parsed)
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:  # argparse ends with it after it has printed a command's help.
        if end.code == 0 and {"-h", "--help"} & {*given}:
            return 0
        raise
    except Exception as error:
        return _refuse(error)
    return 0


def unknown_command(name: str, commands: Iterable[str]) -> ConfigError:
    """The error for a name that is no command, with the nearest one."""
    if name.startswith("-"):
        return ConfigError(f"unknown flag '{name}': start with a command, or see grap-solo --help")
    near = difflib.get_close_matches(name, commands, n=1)
    hint = f"did you mean '{near[0]}'?" if near else "grap-solo --help lists the commands"
    return ConfigError(f"unknown command '{name}': {hint}")


@contextlib.contextmanager
def exit_on_refusal() -> Iterator[None]:
    """For scripts: bad input ends the process as it ends a command, in one line, with code 2."""
    try:
        yield
    except Exception as error:
        sys.exit(_refuse(error))


def _refuse(error: Exception) -> int:
    """Prints the one line of an error for bad input, and returns the exit code 2.

    Raises:
        Exception: the error itself, if the input is not at fault.
    """
    if not _is_refusal(error):
        raise error
    print(refusal(error), file=sys.stderr)
    return 2


def _is_refusal(error: Exception) -> bool:
    """Whether an error says what is wrong with the input, so that its text is enough."""
    if isinstance(error, ConfigError) or is_machine_failure(error):
        return True
    # Where such a module is not imported, or not even installed, the error is none of its own.
    kinds = (getattr(sys.modules.get(module), name, ()) for module, name in THEIR_REFUSALS)
    return any(isinstance(error, kind) for kind in kinds)


def _config_file(given: argparse.Namespace) -> Path:
    """The configuration file that ``NAME`` or the two flags name.

    Raises:
        ConfigError: neither is given, or both; the folder or the file does not exist.
    """
    flags = [given.config_path, given.config_name]
    if (given.config is None) == (flags == [None, None]):
        raise ConfigError(
            "configuration: give NAME (grap-solo configs lists them), or --config-path DIR and "
            "--config-name FILE"
        )
    if given.config is not None:
        return find_packaged(given.config)
    if None in flags:
        raise ConfigError("--config-path DIR and --config-name FILE go together: give both")
    _check_folder("--config-path", given.config_path)
    file: Path = given.config_path / f"{given.config_name.removesuffix('.yaml')}.yaml"
    if not os.path.isfile(file):
        raise ConfigError(f"--config-name: no such file {file}: give the name of a file there")
    return file


def _check_folder(flag: str, folder: Path) -> None:
    if not os.path.isdir(folder):
        raise ConfigError(f"{flag}: no such folder '{folder}': give the folder of the file")


def _composer(overrides: list[str]) -> Callable[[Path], DictConfig]:
    """Makes the function that composes a configuration file with the command line's overrides."""
    from grap_solo.compose import compose

    return lambda file: compose(file, overrides)


def _pretrain(given: argparse.Namespace) -> None:
    """Hands the command line to hydra, with absolute folders: hydra would take them as relative to
    this package."""
    flags = list(given.flags)
    if given.config is not None or not flags:
        packaged = _config_file(given)
        flags.remove(given.config)
        flags.append(f"--config-name={packaged.name}")
        given.config_path, given.config_name = packaged.parent, packaged.name
    folders = {"--config-path": given.config_path, "--config-dir": given.config_dir}
    folders = {flag: folder for flag, folder in folders.items() if folder is not None}
    for flag, folder in folders.items():
        _check_folder(flag, folder)
    job = given.experimental_rerun
    if job is not None and not os.path.isfile(job):
        raise ConfigError(f"pretrain: --experimental-rerun: no such file '{job}'")
    for flag, value in (("--resolve", given.resolve), ("--package", given.package)):
        if value and given.cfg is None:
            raise ConfigError(f"pretrain: {flag} goes with --cfg: add --cfg job")
    tasks = ("install", "uninstall", "query")
    if given.shell_completion and not any(
        each.partition("=")[0] in tasks for each in given.overrides
    ):
        raise ConfigError(
            "pretrain: --shell-completion needs to know for which shell: add install=bash"
        )
    name = given.config_name
    # Hydra also looks in configs/, where every file lies in a folder of its own.
    if name is not None and "/" not in name and given.config_path is not None:
        file = f"{name.removesuffix('.yaml')}.yaml"
        if not any(os.path.isfile(folder / file) for folder in folders.values()):
            _config_file(given)

    from grap_solo.compose import not_utf8, readable_overrides
    from grap_solo.experiments.launch import launch

    absolute = [f"{flag}={folder.resolve()}" for flag, folder in folders.items()]
    overrides = readable_overrides(given.overrides)
    try:
        launch([*flags, *absolute, *overrides])  # The last of two equal flags counts.
    except UnicodeDecodeError as error:
        raise not_utf8(error, folders.values()) from None


def _retrain(given: argparse.Namespace) -> None:
    _check_runs("retrain", given.runs)
    from grap_solo.experiments.retrain import retrain

    epochs = None if given.epochs is None else (given.epochs[0], given.epochs[1])
    retrain(
        given.runs,
        _composer(given.overrides),
        epochs,
        given.mean_last,
        given.heads,
        given.schedule,
    )


def _finetune(given: argparse.Namespace) -> None:
    _check_runs("finetune", given.runs)
    if len(given.runs) > 1:
        raise ConfigError("finetune: give one run's folder")
    from grap_solo.experiments.retrain import finetune

    finetune(given.runs[0], _composer(given.overrides))


def _check_runs(command: str, runs: list[Path]) -> None:
    if not runs:
        raise ConfigError(f"{command}: give the folder of a run: grap-solo {command} RUN_DIR")


def _evaluate_source(given: argparse.Namespace) -> None:
    if given.finetune and given.train is not None:
        raise ConfigError("evaluate: --finetune trains on the run's own images: leave --train out")
    from grap_solo.experiments.evaluate import evaluate_source

    evaluate_source(
        given.source,
        _composer(given.overrides),
        [name for name in ("linear", "knn") if getattr(given, name)],
        backbone=given.backbone,
        train=given.train,
        val=given.val,
        tune=given.finetune,
        umap=given.umap,
        to=given.to,
    )


def _export_run(given: argparse.Namespace) -> None:
    from grap_solo.experiments.export import export

    export(Path(given.run), given.format, given.to)


def _compare(given: argparse.Namespace) -> None:
    file = _config_file(given)
    from grap_solo.experiments.compare import compare
    from grap_solo.experiments.grid import read_grid

    cfg, grid, settings = read_grid(
        file, given.overrides, lambda path, changes: _composer(list(changes))(path)
    )
    for key in ("methods", "seeds"):
        if key not in grid:
            raise ConfigError(f"{key}: missing: add {key}=[...] to the command line or the file")
    launcher = _launcher(given, settings, grid)
    compare(cfg, grid["methods"], grid["seeds"], grid.get("definitions"), launcher)


def _launcher(
    given: argparse.Namespace,
    settings: Sequence[str],
    grid: Mapping[str, Any] | None = None,
) -> Launcher:
    """Makes the launcher of a command's flags, or of the keys of a grid where a flag is not given.

    Args:
        given: with the flags of ``arguments._add_launcher_flags``.
        settings: of SLURM's jobs, such as ``hydra.launcher.partition=gpu``.
        grid: may have ``launcher``, ``parallel`` and ``gpus_per_run``.
    """
    from grap_solo.experiments.tasks import make_launcher

    name, parallel, gpus = (
        (grid or {}).get(key) if getattr(given, key) is None else getattr(given, key)
        for key in ("launcher", "parallel", "gpus_per_run")
    )
    return make_launcher(name, parallel, gpus, given.cancel_on_interrupt, settings)


def _search(given: argparse.Namespace) -> None:
    file = _config_file(given)
    from grap_solo.experiments.grid import split_settings
    from grap_solo.experiments.search import search

    overrides, settings = split_settings(given.overrides)
    search(
        _composer(overrides)(file),
        given.directory,
        given.trials,
        given.sampler,
        given.pruner,
        given.seed,
        given.storage,
        _launcher(given, settings),
    )


def _map(given: argparse.Namespace) -> None:
    file = _config_file(given)
    from grap_solo.experiments.grid import split_settings
    from grap_solo.experiments.weight_map import map_weights

    overrides, settings = split_settings(given.overrides)
    cfg = _composer(overrides)(file)
    terms = given.terms[0], given.terms[1]
    map_weights(cfg, terms, given.values, given.seeds, _launcher(given, settings))


def _report(given: argparse.Namespace) -> None:
    from grap_solo.report.page import report

    report(given.folders, given.output or given.folders[0] / "report")


def _bench(given: argparse.Namespace) -> None:
    from grap_solo.experiments.bench import bench_step, bench_terms, table_of_ratios
    from grap_solo.records.files import make_folder, write_json

    if given.json is not None:
        make_folder(given.json.parent, "--json")
        if given.json.is_dir():
            raise ConfigError(f"--json: {given.json} is a folder: give a file")
    if given.what == "terms":
        found = bench_terms(batch_size=given.batch, rounds=given.rounds)
    else:
        found = bench_step(
            given.batch, given.rounds, given.accelerator, given.precision, given.only, given.method
        )
    print(table_of_ratios(found))
    if given.json is not None:
        write_json(given.json, found)


def _configs(given: argparse.Namespace) -> None:
    if given.config is None:
        print("\n".join(list_packaged()))
    else:
        print(find_packaged(given.config).read_text(encoding="utf-8"), end="")


def _demo(given: argparse.Namespace) -> None:
    from grap_solo.experiments.demo import demo

    demo(Path("runs/demo"), given.overrides)


def _run_script(given: argparse.Namespace) -> None:
    """Registers the methods and runs the script as if it had been started itself."""
    if given.script is None or not os.path.isfile(given.script):
        name = "nothing" if given.script is None else f"'{given.script}'"
        raise ConfigError(f"run: expected one of solo-learn's scripts, got {name}")
    import runpy

    from grap_solo.solo import BASE, register_method

    if BASE != "solo-learn":
        raise ConfigError("run: solo-learn's main branch cannot be imported: put it on PYTHONPATH")
    from grap_solo.methods import find_method  # Adds the methods to solo-learn's.

    for argument in given.arguments:  # A method of the user's own is in no registry yet.
        key, _, path = argument.lstrip("+").partition("=")
        if key == "method" and ":" in path:
            register_method(path, find_method(path))
    sys.argv = [str(given.script), *given.arguments]
    sys.path.insert(0, str(given.script.resolve().parent))
    runpy.run_path(str(given.script), run_name="__main__")


COMMANDS = {
    "pretrain": _pretrain,
    "retrain": _retrain,
    "finetune": _finetune,
    "evaluate": _evaluate_source,
    "export": _export_run,
    "compare": _compare,
    "search": _search,
    "map": _map,
    "report": _report,
    "bench": _bench,
    "configs": _configs,
    "demo": _demo,
    "run": _run_script,
}

EXTRA_OF = {"configs": "", "report": "report", "search": "search"}
"""The extra that a command needs; ``train`` where none is named."""

THEIR_REFUSALS = (
    ("hydra.errors", "HydraException"),
    ("omegaconf.errors", "OmegaConfBaseException"),
    ("yaml", "YAMLError"),
)
"""Others' errors that say what is wrong with the input: the module and the name of each."""


if __name__ == "__main__":
    sys.exit(main())
