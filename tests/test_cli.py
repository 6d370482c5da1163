"""Help and refusals of the command line: at once, in one line, and without a slow import."""

import json
import subprocess
import sys

import pytest
from helpers import CONFIGS, DIGITS, ROOT

import grap_solo
from grap_solo import arguments
from grap_solo.arguments import build_parser
from grap_solo.cli import COMMANDS, main

SLOW = ["torch", "lightning", "matplotlib", "hydra", "omegaconf", "pandas", "numpy"]
CONFIG = ["--config-path", str(DIGITS), "--config-name", "grap"]
HELPS = [["--help"], *([name, "--help"] for name in COMMANDS)]
REFUSED = {
    "a name that is too long for a file": (
        ["report", "+weighting={" + "a" * 300 + ": 1}"], "report: argument FOLDER: +weighting={aaa"
    ),
    "no such command": (["pretrian"], "unknown command 'pretrian': did you mean 'pretrain'"),
    "no such flag": (["--quick"], "unknown flag '--quick'"),
    "no arguments": (["demo", "now"], "demo: unrecognized arguments: now"),
    "pretrain's flag": (["pretrain", *CONFIG, "--quick"], "pretrain: unknown flag '--quick'"),
    "pretrain's folder": (
        ["pretrain", "--config-path=nowhere", "--config-name=grap", "max_epochs=1"],
        "--config-path: no such folder 'nowhere'",
    ),
    "pretrain's further folder": (
        ["pretrain", *CONFIG, "--config-dir", "nowhere"], "--config-dir: no such folder 'nowhere'",
    ),
    "pretrain's file": (
        ["pretrain", f"--config-path={DIGITS}", "--config-name=grab"], "name: no such file",
    ),
    "retrain's folder": (["retrain", "nowhere"], "nowhere/config.yaml: no such file"),
    "retrain without a folder": (["retrain", "max_epochs=1"], "give the folder of a run"),
    "retrain's value": (
        ["retrain", "--mean-last", "0"], "--mean-last: expected a whole number of 1 or more",
    ),
    "finetune's folder": (["finetune", "nowhere"], "nowhere/config.yaml: no such file"),
    "evaluate's source": (["evaluate", "nowhere"], "SOURCE: nowhere: no such file or folder"),
    "evaluate's images": (
        ["evaluate", "timm:resnet18", "--train", "nowhere"], "--train: nowhere: no such file or",
    ),
    "evaluate's flag": (["evaluate", "timm:resnet18", "--knm"], "unknown flag '--knm'"),
    "export's run": (["export", "nowhere"], "RUN: nowhere: no such file or folder"),
    "export's format": (
        ["export", "nowhere", "--format", "pickle"], "--format: invalid choice: 'pickle'",
    ),
    "compare's file": (
        ["compare", "--config-path", str(DIGITS), "--config-name", "grab"], "no such file",
    ),
    "pretrain without a file": (["pretrain", "max_epochs=1"], "configuration: give NAME (grap"),
    "pretrain's packaged file": (
        ["pretrain", "digits/gra"],
        "NAME: no packaged configuration 'digits/gra' (did you mean 'digits/grap'?)",
    ),
    "compare's two files": (["compare", "table3/digits", *CONFIG], "configuration: give NAME"),
    "search's half a file": (
        ["search", "runs", "--config-path", str(DIGITS)],
        "--config-path DIR and --config-name FILE go together",
    ),
    "map's packaged file": (
        ["map", "digits/gra", "--terms", "x", "y", "--values", "1"],
        "NAME: no packaged configuration",
    ),
    "configs' file": (["configs", "cifar/grap"], "NAME: no packaged configuration 'cifar/grap'"),
    "compare's flag": (["compare", *CONFIG, "--seeds", "1"], "unknown flag '--seeds'"),
    "search's folder": (["search", "--trials", "2", *CONFIG], "arguments are required: DIRECTORY"),
    "search's sampler": (
        ["search", "runs", *CONFIG, "--sampler", "grid"], "--sampler: invalid choice: 'grid'",
    ),
    "search's trials": (
        ["search", "runs", *CONFIG, "--trials", "few"],
        "--trials: expected a whole number of 1 or more, got 'few'",
    ),
    "report's folder": (["report", "nowhere"], "nowhere: no such folder"),
    "bench's kind": (["bench", "epoch"], "invalid choice: 'epoch'"),
    "bench's method": (
        ["bench", "step", "--method", "vicre"], "--method: method: unknown name 'vicre': did you",
    ),
    "bench's contender": (
        ["bench", "step", "--only", "gra"], "--only: contender: unknown name 'gra': did you mean",
    ),
    "run's script": (["run", "nowhere.py"], "expected one of solo-learn's scripts"),
}  # fmt: skip

# Runs every command line in one process, and says after each what it has printed and imported.
ANSWERS = """
import contextlib, io, json, sys
from grap_solo.cli import main

answers = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            code = main(arguments)
    slow = [name for name in json.loads(sys.argv[2]) if name in sys.modules]
    answers.append([code, out.getvalue(), errors.getvalue(), slow])
print(json.dumps(answers))
"""


def python(code, *arguments, cwd=None):
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", code, *arguments],
        capture_output=True, text=True, cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """The answer to each command line, given in an empty folder that stays empty."""
    folder = tmp_path_factory.mktemp("empty")
    lines = [*HELPS, *(line for line, _ in REFUSED.values())]
    found = json.loads(python(ANSWERS, json.dumps(lines), json.dumps(SLOW), cwd=folder))
    assert list(folder.iterdir()) == []
    return {" ".join(line): answer for line, answer in zip(lines, found)}


@pytest.mark.parametrize("line", HELPS, ids=" ".join)
def test_help_explains_a_command_and_imports_nothing_slow(line, answers):
    code, out, errors, slow = answers[" ".join(line)]
    assert (code, errors, slow) == (0, "", [])
    command = line[0] if len(line) > 1 else ""
    assert out.startswith(f"usage: grap-solo {command}".rstrip())
    assert not command or f"example: grap-solo {command}" in out


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_one_line_and_imports_nothing_slow(case, answers):
    line, message = REFUSED[case]
    code, out, errors, slow = answers[" ".join(line)]
    assert (code, out, slow) == (2, "", [])
    assert message in errors and errors.startswith("grap-solo: ") and errors.count("\n") == 1


def test_every_option_is_explained():
    _, commands = build_parser()
    assert list(commands) == list(COMMANDS)
    for name, parser in commands.items():
        for action in parser._actions:
            assert action.help, (name, action.dest)


def test_nothing_given_is_the_help_and_exit_code_2(capsys):
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().out
    assert main(["help"]) == 0


def test_the_names_that_flags_accept_are_those_of_the_modules_behind_them():
    from grap_solo.experiments import bench, export, search, timing
    from grap_solo.methods import METHODS

    assert tuple(export.EXPORT_FORMATS) == arguments.FORMAT_NAMES
    assert tuple(search.SAMPLERS) == arguments.SAMPLER_NAMES
    assert tuple(search.PRUNERS) == arguments.PRUNER_NAMES
    assert tuple(timing.AUTOCAST) == arguments.PRECISION_NAMES
    assert arguments.CONTENDER_NAMES == bench.CONTENDERS
    for name in METHODS:
        assert arguments._bench_method(name) == name


def test_overrides_stand_anywhere_and_folders_may_have_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("lr=1", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.yaml").touch()
    _, commands = build_parser()
    line = ["max_epochs=2", "lr=1", "--epochs", "1", "3", "~scheduler", "b"]
    given = commands["retrain"].parse(line)
    assert [str(run) for run in given.runs] == ["lr=1", "b"] and given.epochs == [1, 3]
    assert given.overrides == ["max_epochs=2", "~scheduler"]
    given = commands["search"].parse(["seed=1", "-cp", "lr=1", "out", "-cn", "x", "+a.b=2"])
    assert (str(given.directory), str(given.config_path)) == ("out", "lr=1")
    assert given.overrides == ["seed=1", "+a.b=2"]


def test_a_script_gets_its_own_flags_as_they_are():
    _, commands = build_parser()
    given = commands["run"].parse(["main.py", "--config-path", "a", "--help", "x=1", "-m"])
    assert str(given.script) == "main.py"
    assert given.arguments == ["--config-path", "a", "--help", "x=1", "-m"]


def test_hydra_gets_folders_that_are_absolute_and_overrides_behind_the_flags(capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    line = [
        "pretrain",
        "max_epochs=7",
        "-cp=configs/digits",
        "seed=3",
        "--config-name",
        "grap.yaml",
    ]
    assert main([*line, "--cfg", "job", "name=x"]) == 0
    out = capfd.readouterr().out
    assert "max_epochs: 7" in out and "seed: 3" in out and "name: x" in out


@pytest.mark.parametrize("name", ["digits/grap_vicreg", "digits/grap_vicreg.yaml"])
def test_a_packaged_configuration_is_the_file_that_the_flags_name(
    name, capfd, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    printed = []
    for chosen in ([name], [f"--config-path={DIGITS}", "--config-name=grap_vicreg"]):
        assert main(["pretrain", "max_epochs=7", *chosen, "--cfg", "job"]) == 0
        printed.append(capfd.readouterr().out)
    assert printed[0] == printed[1] and "max_epochs: 7" in printed[0]


def test_every_configuration_is_listed_and_printed_as_it_is(capsys):
    assert main(["configs"]) == 0
    names = capsys.readouterr().out.split()
    assert {f"{name}.yaml" for name in names} == {
        file.relative_to(CONFIGS).as_posix() for file in CONFIGS.rglob("*.yaml")
    }
    assert main(["configs", "cifar10/grap"]) == 0
    assert capsys.readouterr().out == (CONFIGS / "cifar10" / "grap.yaml").read_text()


def test_the_module_is_the_command_and_knows_its_version():
    line = [sys.executable, "-m", "grap_solo", "--version"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, f"grap-solo {grap_solo.__version__}\n")


ORDERS = [
    "from grap_solo import balance",
    "import grap_solo.balance; from grap_solo import balance",
    "from grap_solo import balance; import grap_solo.balance",
    "import grap_solo.methods; from grap_solo import balance",
    "from grap_solo import *",
]
BALANCE = """
import grap_solo, sys, types
assert isinstance(balance, types.FunctionType) and grap_solo.balance is balance
assert isinstance(sys.modules["grap_solo.balance"], types.ModuleType)
"""
NAMES = """
import grap_solo
for name in grap_solo.__all__:
    assert getattr(grap_solo, name).__module__.startswith("grap_solo.")
"""
NO_CONTENDERS = """
import sys, grap_solo.experiments.compare
assert "grap_solo.experiments.bench" not in sys.modules
"""

# Runs each piece of code as if it were first to import the package; what is slow is imported once.
FIRST = """
import json, os, sys, traceback
import lightning.pytorch, timm

assert not any(name.startswith("grap_solo") for name in sys.modules)
codes = []
for code in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        try:
            exec(code, {})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    codes.append(os.waitpid(child, 0)[1])
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def ended():
    """The exit code of each piece of code."""
    pieces = [*(f"{order}\n{BALANCE}" for order in ORDERS), NAMES, NO_CONTENDERS]
    return dict(zip(pieces, json.loads(python(FIRST, json.dumps(pieces)))))


@pytest.mark.parametrize("order", ORDERS)
def test_balance_is_the_function_whichever_import_comes_first(order, ended):
    assert ended[f"{order}\n{BALANCE}"] == 0


def test_the_package_lists_its_names_and_imports_them_on_first_use(ended):
    python(
        "import sys, grap_solo\n"
        "assert {*grap_solo.__all__} <= {*dir(grap_solo)}\n"
        "assert not hasattr(grap_solo, 'nothing') and 'torch' not in sys.modules\n"
    )
    assert ended[NAMES] == 0


def test_a_comparison_does_without_the_benchmarks_contenders(ended):
    assert ended[NO_CONTENDERS] == 0
