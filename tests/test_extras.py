"""Each package is declared, torch is enough for the library, and a missing extra is named."""

import ast
import configparser
import functools
import json
import re
import subprocess
import sys
from importlib.metadata import packages_distributions

import pytest
from helpers import ROOT
from run_folders import write_backbone_run, write_run

import grap_solo
from grap_solo.cli import COMMANDS, EXTRA_OF
from grap_solo.extras import EXTRAS, INCLUDED, modules_of

SETUP = configparser.ConfigParser(delimiters="=")
SETUP.read(ROOT / "setup.cfg")
BASE = ("torch", "numpy")
FOUND_IN = {"onnxscript": "onnxscript", "onnx": "onnx", "umap": "umap-learn"}
"""The distributions of modules that the tests' environment does not have."""


def declared(lines):
    """The distributions of a list of requirements, in small letters."""
    return {re.split(r"[\[<>=! ]", line)[0].lower() for line in lines.split("\n") if line}


@functools.cache
def distributions():
    """The distributions by module. Looking them up takes seconds."""
    return packages_distributions()


def distribution(module):
    """The distribution that brings a module, in small letters."""
    top, _, below = module.partition(".")
    if top == "hydra_plugins":
        return below.replace("_", "-")
    return FOUND_IN.get(top) or distributions()[top][0].lower().replace("_", "-")


def imported(folder):
    """The modules outside the standard library that the files of a folder import, by file."""
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [each.name for each in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            for name in names:
                if name.split(".")[0] not in sys.stdlib_module_names:
                    yield file, name.split(".")[0]


def test_every_package_that_the_project_imports_is_in_an_extra():
    known = {module.split(".")[0] for extra in EXTRAS.values() for module in extra}
    own = {"grap_solo", "solo", *BASE}
    missing = {(str(file), name) for file, name in imported("grap_solo") if name not in known | own}
    assert not missing


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_declares_what_it_brings(extra):
    lines = SETUP["options.extras_require"][extra]
    assert declared(lines) - {"grap-solo"} >= {distribution(each) for each in EXTRAS[extra]}
    included = re.findall(r"grap-solo\[(.*)\]", lines)
    assert included == ([INCLUDED[extra]] if extra in INCLUDED else [])


def test_the_package_itself_brings_torch_and_numpy_alone():
    assert declared(SETUP["options"]["install_requires"]) == {*BASE}
    everything = re.findall(r"grap-solo\[(.*)\]", SETUP["options.extras_require"]["all"])
    assert {*everything[0].split(",")} == {*EXTRAS} - {"train", "report"}  # In search.


@pytest.mark.parametrize("folder", ["scripts", "benchmarks", "tests", "notebooks", "docs"])
def test_what_the_tests_and_scripts_import_is_pinned(folder):
    lines = (ROOT / "requirements-dev.txt").read_text()
    pinned = {re.split(r"[=\[ ]", line)[0].lower() for line in lines.split("\n")}
    files = {file.stem for file in ROOT.rglob("*.py")} | {"grap_solo", "solo", "aligned_hpo"}
    for file, name in imported(folder):
        if name not in files | {*FOUND_IN}:
            assert distribution(name) in pinned, (file, name)


# The modules in sys.argv[1] are not found, as if they were not installed.
BLOCK = """
import json, sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        hidden = name.split(".")[0] in blocked
        return None if hidden else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

blocked = set(json.loads(sys.argv[1]))
sys.meta_path[:] = map(Hiding, sys.meta_path)
"""


def blocked_run(code, blocked, *arguments, cwd=None):
    """Runs code in a process without some modules and returns what it prints."""
    line = [sys.executable, "-c", BLOCK + code, json.dumps(sorted(blocked)), *arguments]
    done = subprocess.run(line, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


LIBRARY = """
import torch
import grap_solo
from grap_solo.weighting import WEIGHTINGS
assert grap_solo.__all__ and all(getattr(grap_solo, name) for name in grap_solo.__all__)
import grap_solo.diagnostics

exec(sys.argv[2], names := {})
assert names["step"].weights.shape == (2,)
refused = {}
for name in WEIGHTINGS:
    for more in ({}, {"shared_heads": "aligned_mtl"}):
        try:
            grap_solo.build_weighting({"name": name, **more}, ["a", "b"])
        except grap_solo.ConfigError as error:
            refused[f"{name} {' '.join(more)}"] = str(error)
try:
    grap_solo.load_backbone(".")
except grap_solo.ConfigError as error:
    refused["load_backbone"] = str(error)
print(json.dumps(refused))
"""


def test_the_library_needs_torch_alone():
    """jinja2 is torch's own."""
    blocked = {"numpy", *(each for extra in EXTRAS for each in EXTRAS[extra])} - {"jinja2"}
    blocked = {each.split(".")[0] for each in blocked}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    printed = blocked_run(LIBRARY, blocked, blocks[0] + blocks[1])
    refused = json.loads(printed.splitlines()[-1])
    learned = {"grap", "fixed", "equal", "gradnorm", "dwa"}
    assert not learned & {*refused} and "load_backbone" in refused and "pcgrad " in refused
    for name, message in refused.items():
        # One needs a file, and some take no key.
        if not name.startswith("scheduled") and "takes no key" not in message:
            extra = "cagrad" if name.startswith("cagrad") else "train"
            assert f'not installed: pip install "grap-solo[{extra}]"' in message, name


COMMAND_LINES = """
import contextlib, io
from grap_solo.cli import main

answers = []
for line in json.loads(sys.argv[2]):
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        with contextlib.redirect_stdout(io.StringIO()):
            code = main(line)
    answers.append([code, errors.getvalue()])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """A command line of each command that its parser takes."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    write_run(folder, {"a": 1.0, "b": 2.0})
    write_backbone_run(folder.with_name("backbone"), "test_resnet")
    script = folder / "main.py"
    script.touch()
    run, name = str(folder), "digits/grap"
    return {
        "pretrain": ["pretrain", name],
        "retrain": ["retrain", run],
        "finetune": ["finetune", run],
        "evaluate": ["evaluate", run],
        "export": ["export", str(folder.with_name("backbone"))],
        "compare": ["compare", name],
        "search": ["search", "study", name],
        "map": ["map", name, "--terms", "a", "b", "--values", "1"],
        "report": ["report", run, "--output", str(folder / "report")],
        "bench": ["bench", "terms"],
        "configs": ["configs"],
        "demo": ["demo"],
        "run": ["run", str(script)],
    }


@pytest.mark.parametrize("gone", ["everything", *sorted({"train", *EXTRA_OF.values()} - {""})])
def test_a_command_names_the_extra_that_it_misses(gone, lines, tmp_path):
    """Without all extras, and without the modules of one extra alone."""
    assert {*lines} == {*COMMANDS}
    extras = EXTRAS if gone == "everything" else {gone: EXTRAS[gone]}
    blocked = {each.split(".")[0] for modules in extras.values() for each in modules}
    extra_of = {name: EXTRA_OF.get(name, "train") for name in lines}
    needing = {
        name: extra
        for name, extra in extra_of.items()
        if extra and {*modules_of(extra)} & {each for mine in extras.values() for each in mine}
    }
    given = json.dumps([lines[name] for name in needing])
    answers = json.loads(blocked_run(COMMAND_LINES, blocked, given, cwd=tmp_path))
    for (name, extra), (code, errors) in zip(needing.items(), answers):
        assert code == 2 and errors.count("\n") == 1, (name, errors)
        assert errors.startswith(f"grap-solo: {name}: ")
        assert errors.endswith(f'not installed: pip install "grap-solo[{extra}]"\n')
    assert list(tmp_path.iterdir()) == []


def test_a_report_needs_its_own_extra_alone(lines, tmp_path):
    others = {each.split(".")[0] for extra in EXTRAS if extra != "report" for each in EXTRAS[extra]}
    others -= {"PIL"}  # matplotlib brings it.
    given = json.dumps([lines["report"], lines["configs"]])
    answers = json.loads(blocked_run(COMMAND_LINES, others, given, cwd=tmp_path))
    assert answers == [[0, ""], [0, ""]]


FEATURES = {
    "umap": ["evaluate", "RUN", "--umap", "picture.png"],
    "onnx": ["export", "RUN", "--format", "onnx"],
    "slurm": ["pretrain", "digits/grap", "hydra/launcher=submitit_slurm", "--multirun"],
    "slurm, of a comparison": [
        "compare", "digits/grap", "methods=[grap]", "seeds=[1]", "--launcher", "slurm",
    ],
    "cagrad": ["pretrain", "digits/grap", "~weighting", "+weighting={name: cagrad}"],
}  # fmt: skip


@pytest.fixture(scope="module")
def features(lines, tmp_path_factory):
    """The answers of a process that has none of these extras' own packages."""
    given = [[lines["export"][1] if each == "RUN" else each for each in line]
             for line in FEATURES.values()]  # fmt: skip
    extras = {name.partition(",")[0] for name in FEATURES}
    blocked = {each.split(".")[0] for extra in extras for each in EXTRAS[extra]} - {"torchjd"}
    folder = tmp_path_factory.mktemp("empty")
    answers = json.loads(blocked_run(COMMAND_LINES, blocked, json.dumps(given), cwd=folder))
    return dict(zip(FEATURES, answers))


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_names_the_extra_that_it_misses(feature, features):
    code, errors = features[feature]
    assert code == 2 and errors.count("\n") == 1, errors
    extra = feature.partition(",")[0]
    assert re.search(rf'not installed: pip install "grap-solo\[{extra}\]"', errors)


def test_the_version_is_written_once():
    assert SETUP["metadata"]["version"] == "attr: grap_solo.__version__"
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {grap_solo.__version__}\n" in citation
    assert f"\n## {grap_solo.__version__} " in (ROOT / "CHANGELOG.md").read_text()
