"""The parser of the command line, with the flags, help and example of each command.

Nothing slow is imported here, so that help and refusals answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from grap_solo.errors import ConfigError, unknown_name
from grap_solo.packaged import list_packaged
from grap_solo.records.files import CONFIG_FILE, expand_path

# What flags accept. The modules that use these names take seconds to import; a test compares both.
SAMPLER_NAMES = ("tpe", "random")
PRUNER_NAMES = ("none", "median")
FORMAT_NAMES = ("timm", "torchvision", "state-dict", "onnx")
LAUNCHER_NAMES = ("local", "slurm")
PRECISION_NAMES = ("32-true", "bf16-mixed")
CONTENDER_NAMES = ("fixed", "grap", "grap_compiled", "k_backwards", "torchjd", "solo_learn")
BENCH_CONFIGS = "cifar10/"


class Parser(argparse.ArgumentParser):
    """A parser of one command. Its errors are one line."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options, allow_abbrev=False)

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parses a command's arguments. Hydra's overrides may stand anywhere among them.

        Raises:
            ConfigError: an argument that the command does not take.
        """
        if self.get_default("verbatim"):
            return self.parse_args(list(arguments))
        if self.get_default("overrides") is None:
            return self.parse_intermixed_args(list(arguments))
        folders = any(
            not action.option_strings and action.dest != "config" for action in self._actions
        )
        overrides = [each for each in arguments if _is_override(each, folders)]
        rest = [each for each in arguments if not _is_override(each, folders)]
        for place, each in enumerate(rest):
            self._refuse_dashes(each, *rest[place + 1 : place + 2])
        given = self.parse_intermixed_args(rest)
        given.overrides, given.flags = overrides, rest
        return given

    def _refuse_dashes(self, argument: str, following: str = "VALUE") -> None:
        """Refuses ``--key=value`` and ``--key value``: a configuration's keys have no dashes.

        Args:
            argument: as given.
            following: the argument after it.
        """
        flag, equals, value = argument.partition("=")
        known = self._option_string_actions
        if not re.match("--?[A-Za-z]", flag) or flag in known:
            return
        if not flag.startswith("--") and any(
            len(each) == 2 and flag.startswith(each) for each in known
        ):
            return  # A short flag with its value, such as -cjob.
        near = difflib.get_close_matches(flag, known, n=1, cutoff=0.85)
        near = [RENAMED_FLAGS[flag]] if RENAMED_FLAGS.get(flag) in known else near
        override = f"{flag.lstrip('-')}={value if equals else following}"
        key = f"a key of the configuration has no dashes: write {override}"
        self.error(f"unknown flag '{flag}': {f'did you mean {near[0]}?' if near else key}")

    def error(self, message: str) -> NoReturn:
        if "arguments are required: DIRECTORY" in message:
            message += ": write ./NAME=VALUE for a folder with an equals sign"
        raise ConfigError(f"{self.prog.removeprefix('grap-solo ')}: {message}")


KEY = re.compile(r"(\+{0,2}|~)[\w.@:/$-]+")
"""A key of hydra's, with its sign."""


def _is_override(argument: str, folders: bool) -> bool:
    """Whether an argument is one of hydra's overrides: ``key=value`` or ``~key``.

    Args:
        argument: as given.
        folders: whether the command also takes folders, whose names may have an equals sign.
    """
    key, equals, _ = argument.partition("=")
    if key.startswith(("-", "/", "./", "../", "~/", "$")) or os.path.isdir(argument):
        return False
    if folders and (_has_folder(key) or not KEY.fullmatch(key)):
        return False
    return bool(equals) or argument.startswith("~")


def _has_folder(key: str) -> bool:
    """Whether a text is a path into a folder that is there."""
    return "/" in key and os.path.isdir(os.path.dirname(key))


CONFIG_USAGE = "(NAME | --config-path DIR --config-name FILE)"
LAUNCHER_USAGE = (
    "[--launcher local|slurm] [--parallel N]\n"
    "           [--gpus-per-run G] [--cancel-on-interrupt] [key=value ...]"
)
SLURM_SETTINGS = "hydra.launcher.KEY=\n           sets up SLURM's jobs, as for pretrain"
RENAMED_FLAGS = {"--processes": "--parallel"}


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """Makes the parser of the whole command line, and those of its commands, by name."""
    parser = Parser(
        prog="grap-solo",
        description="Trains composite self-supervised methods and learns the weights of their "
        "terms.",
        epilog="grap-solo COMMAND --help explains a command.",
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)

    def add(
        name: str,
        text: str,
        example: str,
        overrides: str = "",
        **options: Any,
    ) -> Parser:
        usage = options.pop("usage", None)
        command: Parser = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=(f"key=value: {overrides}\n\n" if overrides else "") + f"example: {example}",
            usage=None if usage is None else f"grap-solo {name} {usage}",
        )
        command.set_defaults(overrides=[] if overrides else None, **options)
        return command

    _add_pretrain(
        add(
            "pretrain",
            "train one configuration, or several with hydra's --multirun",
            "grap-solo pretrain digits/grap max_epochs=5",
            "changes a key of the configuration, as hydra's overrides do",
            usage=f"{CONFIG_USAGE} [hydra's flags] [key=value ...]",
        )
    )

    changes = "changes a key of the run's configuration, such as max_epochs=100"
    retrain = add(
        "retrain",
        "train from scratch with the median weights that runs have found",
        "grap-solo retrain runs/grap-seed5 runs/grap-seed6 --epochs 5 19",
        changes,
        usage="RUN_DIR ... [--epochs FIRST LAST | --mean-last STEPS | --schedule]\n           "
        "[--heads as-learned|weighted] [key=value ...]",
    )
    retrain.add_argument(
        "runs", nargs="*", type=_run_folder, metavar="RUN_DIR",
        help="a run's folder; several runs' steps are pooled, and the first one's configuration "
        "is trained",
    )  # fmt: skip
    retrain.add_argument(
        "--epochs", nargs=2, type=int, metavar=("FIRST", "LAST"),
        help="take the median over these epochs alone, both included",
    )  # fmt: skip
    retrain.add_argument(
        "--mean-last", type=_at_least(1), metavar="STEPS",
        help="take the mean over the last STEPS steps instead of a median",
    )  # fmt: skip
    retrain.add_argument(
        "--heads", choices=("as-learned", "weighted"), default="as-learned",
        help="as-learned trains the heads as the run did that found the weights, weighted by the "
        "weights alone, as the paper does (default: as-learned)",
    )  # fmt: skip
    retrain.add_argument(
        "--schedule", action="store_true",
        help="replay the weights in the course of the run instead of holding their median",
    )  # fmt: skip

    finetune = add(
        "finetune",
        "train a run's backbone further with the labels, end to end",
        "grap-solo finetune runs/grap-seed5 max_epochs=20",
        changes,
        usage="RUN_DIR [key=value ...]",
    )
    finetune.add_argument(
        "runs", nargs="*", type=_run_folder, metavar="RUN_DIR", help="the run's folder"
    )

    _add_evaluate(
        add(
            "evaluate",
            "measure the embeddings of a run's backbone or of any other: linear probe, k-NN, ranks",
            "grap-solo evaluate runs/grap-seed5",
            "changes a key of the run's configuration, such as data.num_workers=4 or\n"
            "           accelerator=cpu",
            usage="SOURCE [--backbone NAME] [--train DATA --val DATA] [--linear] [--knn]\n"
            "           [--finetune] [--umap PNG] [--to DIR] [key=value ...]",
        )
    )
    _add_export(
        add(
            "export",
            "write a run's backbone as a model folder that timm, torchvision or ONNX can load",
            "grap-solo export runs/grap-seed5 --to my-model",
        )
    )

    compare = add(
        "compare",
        "train methods x seeds and write one table with its pictures; started again, it resumes",
        "grap-solo compare digits/grap 'methods=[fixed,grap]' 'seeds=[5,6]'",
        "methods=[...] and seeds=[...] say what to train; launcher=, parallel= and gpus_per_run=\n"
        f"           are the flags of these names, as a grid's file has them; {SLURM_SETTINGS};\n"
        "           any other key changes the configuration of all runs",
        usage=f"{CONFIG_USAGE}\n           [methods=[...]] [seeds=[...]] {LAUNCHER_USAGE}",
    )
    _add_config_flags(compare)
    _add_launcher_flags(compare)

    search = add(
        "search",
        "search for the weights, one training a trial, and train GraP to compare; started "
        "again, it resumes",
        "grap-solo search runs/search digits/grap --trials 16",
        f"changes a key of the configuration of all runs; {SLURM_SETTINGS}",
        usage=f"DIRECTORY {CONFIG_USAGE}\n           [--trials N] [--sampler tpe|random] "
        f"[--pruner none|median] [--seed N]\n           [--storage STORAGE] {LAUNCHER_USAGE}",
    )
    search.add_argument(
        "directory", type=_path, metavar="DIRECTORY", help="the folder for the study and its runs"
    )
    _add_config_flags(search)
    search.add_argument(
        "--trials", type=_at_least(1), default=16, metavar="N",
        help="the number of trials, earlier ones in the folder included (default: 16)",
    )  # fmt: skip
    search.add_argument(
        "--sampler", choices=SAMPLER_NAMES, default="tpe",
        help="tpe learns from earlier trials, random does not (default: tpe)",
    )  # fmt: skip
    search.add_argument(
        "--pruner", choices=PRUNER_NAMES, default="none",
        help="median stops a trial that falls below the median of the earlier ones "
        "(default: none)",
    )  # fmt: skip
    search.add_argument(
        "--seed", type=_at_least(0), default=0, metavar="N",
        help="the seed of the sampler, and of the split of the validation images into the half "
        "that the search climbs and the half that it reports; all runs train with the "
        "configuration's own (default: 0)",
    )  # fmt: skip
    search.add_argument(
        "--storage", metavar="STORAGE",
        help="where the study is kept: journal:PATH for a file that workers on many machines may "
        "share, or a database's URL such as postgresql://user@host/name (default: SQLite, in "
        "DIRECTORY, for workers of one machine)",
    )  # fmt: skip
    _add_launcher_flags(search)

    chart = add(
        "map",
        "train with every pair of weights of two terms and draw the accuracies as a map, with the "
        "way of the learned weights; started again, it resumes",
        "grap-solo map digits/NAME --terms X Y --values 0.04 0.2 1 5 25 100 --seeds 1 2",
        f"changes a key of the configuration of all runs; {SLURM_SETTINGS}",
        usage=f"{CONFIG_USAGE} --terms X Y --values WEIGHT ...\n           [--seeds N ...] "
        f"{LAUNCHER_USAGE}",
    )
    _add_config_flags(chart)
    _add_launcher_flags(chart)
    chart.add_argument(
        "--terms", nargs=2, required=True, metavar=("X", "Y"),
        help="the two terms whose weights vary; the others keep theirs",
    )  # fmt: skip
    chart.add_argument(
        "--values", nargs="+", type=float, required=True, metavar="WEIGHT",
        help="the weights that each of the two takes, relative to the first other term's",
    )  # fmt: skip
    chart.add_argument(
        "--seeds", nargs="+", type=_at_least(0), metavar="N",
        help="the seeds of every run (default: the configuration's)",
    )  # fmt: skip

    report = add(
        "report",
        "draw the pictures of runs and comparisons and write one HTML page",
        "grap-solo report runs/grap-seed5 runs/table3-digits --output runs/report",
    )
    report.add_argument(
        "folders", nargs="+", type=_folder_of_runs, metavar="FOLDER",
        help="a run's folder, or one that holds runs, such as a comparison's",
    )  # fmt: skip
    report.add_argument(
        "--output", type=_path, metavar="DIR",
        help="the folder to write to (default: report in the first FOLDER)",
    )  # fmt: skip

    _add_bench(
        add(
            "bench",
            "time a training step of GraP against plain training and others",
            "grap-solo bench step --batch 64 --rounds 12 --only fixed grap",
        )
    )
    configs = add(
        "configs",
        "list the packaged configurations, or print one",
        "grap-solo configs cifar10/grap",
    )
    configs.add_argument(
        "config", nargs="?", metavar="NAME",
        help="the configuration to print, as in its file; pretrain NAME --cfg job prints all keys",
    )  # fmt: skip
    add(
        "demo",
        "train two methods on scikit-learn's digits, with default, equal and learned "
        "weights, into runs/demo",
        "grap-solo demo",
        "changes a key of the configuration of all runs",
        usage="[key=value ...]",
    )
    script = add(
        "run",
        "run one of solo-learn's scripts with the grap_* methods among its own",
        "grap-solo run main_pretrain.py --config-path scripts/pretrain/cifar --config-name NAME",
        verbatim=True,
    )
    script.add_argument("script", nargs="?", type=_path, metavar="SCRIPT", help="the script's file")
    script.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="the script's own arguments, passed on as given"
    )
    return parser, dict(commands.choices)


def _add_config_flags(parser: Parser) -> None:
    parser.add_argument(
        "config", nargs="?", metavar="NAME",
        help="a packaged configuration, such as cifar10/grap: grap-solo configs lists them",
    )  # fmt: skip
    parser.add_argument(
        "--config-path", "-cp", type=_path, metavar="DIR",
        help="the folder of a configuration file of your own",
    )  # fmt: skip
    parser.add_argument(
        "--config-name", "-cn", metavar="FILE", help="the file's name, with or without .yaml"
    )


def _add_launcher_flags(parser: Parser) -> None:
    """Adds the flags of which ``cli._launcher`` makes a launcher."""
    parser.add_argument(
        "--launcher", choices=LAUNCHER_NAMES,
        help="where runs train: local, on this machine, or slurm, each as a job on a SLURM "
        "cluster, such as --launcher slurm hydra.launcher.partition=gpu "
        "hydra.launcher.timeout_min=600 (default: local)",
    )  # fmt: skip
    parser.add_argument(
        "--parallel", type=_at_least(1), metavar="N",
        help="train at most N runs at a time, such as --parallel 4; locally each in a process with "
        "a GPU and a share of the cores of its own (default: one after the other, in this process; "
        "on SLURM as many as it lets)",
    )  # fmt: skip
    parser.add_argument(
        "--gpus-per-run", type=_gpus, metavar="G",
        help="the GPUs of each run; below 1 runs share a GPU, such as --parallel 4 --gpus-per-run "
        "0.5 on two GPUs; accelerator=cpu needs none (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--cancel-on-interrupt", action="store_true",
        help="with --launcher slurm: Ctrl-C also cancels the jobs; without it they go on, and the "
        "same command takes up their results",
    )  # fmt: skip


def _gpus(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a whole number, or a fraction such as 0.5, got {text!r}"
        ) from None


def _add_pretrain(parser: Parser) -> None:
    """Adds hydra's flags, which hydra then parses again."""
    _add_config_flags(parser)

    def flag(*names: str, text: str, to: Any = parser, **options: Any) -> None:
        to.add_argument(*names, help=text, **options)

    flag(
        "--config-dir", "-cd", type=_path, metavar="DIR",
        text="also look for files in this folder",
    )  # fmt: skip
    what: Any = parser.add_mutually_exclusive_group()
    flag(
        "--multirun", "-m", action="store_true", to=what,
        text="train once for each combination of values",
    )  # fmt: skip
    flag("--run", "-r", action="store_true", text="train once (the default)", to=what)
    flag(
        "--cfg", "-c", choices=("job", "hydra", "all"), to=what,
        text="print the configuration instead of training",
    )  # fmt: skip
    flag("--resolve", action="store_true", text="resolve the interpolations that --cfg prints")
    flag("--package", "-p", metavar="KEY", text="print this part of the configuration with --cfg")
    flag(
        "--info", "-i", nargs="?", const="all", to=what,
        choices=("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
        text="print what hydra knows instead of training",
    )  # fmt: skip
    flag("--hydra-help", action="store_true", text="print hydra's own help")
    flag("--version", action="store_true", text="print hydra's version")
    flag(
        "--shell-completion", "-sc", action="store_true", to=what,
        text="install hydra's shell completion",
    )  # fmt: skip
    flag("--experimental-rerun", metavar="FILE", text="train again from a job that hydra pickled")


def _add_evaluate(parser: Parser) -> None:
    parser.add_argument(
        "source", type=_source, metavar="SOURCE",
        help="a run's folder, one of its checkpoints, an export's folder, timm:NAME for the "
        "weights of timm's hub, or a file of weights with --backbone",
    )  # fmt: skip
    parser.add_argument(
        "--backbone", metavar="NAME",
        help="whose weights the file holds: resnet18, resnet50, or a model of timm",
    )  # fmt: skip
    for flag, what in (("--train", "to fit on"), ("--val", "to score on")):
        parser.add_argument(
            flag, type=_images, metavar="DATA",
            help=f"the images {what}: a folder of class folders, a Parquet file, or digits "
            "(default: the run's)",
        )  # fmt: skip
    parser.add_argument("--linear", action="store_true", help="measure the linear probe alone")
    parser.add_argument(
        "--knn", action="store_true", help="measure k-NN alone, or with --linear both"
    )
    parser.add_argument(
        "--finetune", action="store_true",
        help="also train the run's backbone further with the labels, as finetune does",
    )  # fmt: skip
    parser.add_argument(
        "--umap", type=_path, metavar="PNG",
        help="also draw the validation embeddings in two dimensions (needs umap-learn)",
    )  # fmt: skip
    parser.add_argument(
        "--to", type=_path, metavar="DIR",
        help="the folder for evaluation.json (default: the run's, or beside the file)",
    )  # fmt: skip


def _add_export(parser: Parser) -> None:
    parser.add_argument(
        "run", type=_source, metavar="RUN", help="a run's folder, or one of its checkpoints"
    )
    parser.add_argument(
        "--format", choices=FORMAT_NAMES,
        help="timm and torchvision: safetensors with config.json; state-dict: torch's file; onnx "
        "(default: timm, or torchvision for the small stem of CIFAR, which timm does not have)",
    )  # fmt: skip
    parser.add_argument(
        "--to", type=_path, metavar="DIR", help="the folder to write (default: export in the run's)"
    )


def _add_bench(parser: Parser) -> None:
    parser.add_argument(
        "what", choices=("step", "terms"),
        help="step: a step of one method by several contenders; terms: how a step grows with the "
        "number of terms",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=_at_least(1), default=64, metavar="N",
        help="the images of a step, two views each (default: 64)",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=_at_least(1), default=7, metavar="N",
        help="how often each contender is timed (default: 7)",
    )  # fmt: skip
    parser.add_argument(
        "--accelerator", choices=("cpu", "gpu"), default="cpu",
        help="step: where to train (default: cpu)",
    )  # fmt: skip
    parser.add_argument(
        "--precision", choices=PRECISION_NAMES, default="32-true",
        help="step: Lightning's precision (default: 32-true)",
    )  # fmt: skip
    parser.add_argument(
        "--method", type=_bench_method, metavar="NAME",
        help="step: the method to time, without grap_ (default: the first one)",
    )  # fmt: skip
    parser.add_argument(
        "--only", nargs="+", type=_contender, metavar="NAME",
        help=f"step: the contenders to time, of {', '.join(CONTENDER_NAMES)} (default: all "
        "installed ones but grap_compiled, which needs a C++ compiler)",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=_path, metavar="FILE", help="also write the measurements to this file"
    )


# ---- values of arguments --------------------------------------------------------------------


def _at_least(least: int) -> Callable[[str], int]:
    """Makes the type of a whole number that has a lower bound."""

    def parse(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of {least} or more, got '{text}'"
            )
        return int(text)

    return parse


def _path(text: str) -> Path:
    try:
        return Path(expand_path(text))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _run_folder(text: str) -> Path:
    folder = _path(text)
    file = folder / CONFIG_FILE
    if not os.path.isfile(file):
        raise argparse.ArgumentTypeError(
            f"{file}: no such file: give the folder of a run that has been trained"
        )
    return folder


def _source(text: str) -> str:
    if text.startswith("timm:"):
        return text
    path = _path(text)
    if not os.path.exists(path):
        raise argparse.ArgumentTypeError(
            f"{path}: no such file or folder: give that of a run, or weights"
        )
    return str(path)


def _images(text: str) -> str:
    if text == "digits":
        return text
    path = _path(text)
    if not os.path.exists(path):
        raise argparse.ArgumentTypeError(f"{path}: no such file or folder: give one of images")
    return str(path)


def _folder_of_runs(text: str) -> Path:
    folder = _path(text)
    if not os.path.isdir(folder):
        raise argparse.ArgumentTypeError(
            f"{folder}: no such folder: give that of a run, or one that holds runs"
        )
    return folder


def _contender(text: str) -> str:
    if text not in CONTENDER_NAMES:
        raise argparse.ArgumentTypeError(str(unknown_name("contender", text, CONTENDER_NAMES)))
    return text


def _bench_method(text: str) -> str:
    # bench reads this folder: each method has a file there, and a grap_ variant of it.
    files = [each for each in list_packaged() if each.startswith(BENCH_CONFIGS)]
    names = [name for each in files if not (name := Path(each).name).startswith("grap")]
    if text not in names:
        raise argparse.ArgumentTypeError(str(unknown_name("method", text, names)))
    return text
