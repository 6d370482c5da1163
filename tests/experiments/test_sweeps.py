"""The sweeps: what W&B's agent and hydra's multirun make of them is what the project takes."""

import csv
import itertools
import re
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from wandb import wandb_agent
from wandb.apis.public.sweeps import _validate_config_and_fill_distribution

from grap_solo.cli import main
from grap_solo.training.config import prepare, run_dir
from grap_solo.weighting import WEIGHTINGS

SWEEPS = ROOT / "configs" / "sweeps"
FILES = sorted(SWEEPS.glob("*.yaml"))
BASES = {"grap": "grap", "methods": "all4one"}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder with nothing but the configurations in it, from which to start."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["grap-solo"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # As main() sets it, and taken back here.
    return tmp_path


@pytest.fixture
def started(monkeypatch):
    """The configurations that were to be trained. Each is checked, and none trains."""
    configurations = []

    def check(cfg, *args, **kwargs):
        prepare(cfg)
        configurations.append(cfg)

    monkeypatch.setattr("grap_solo.training.run.pretrain", check)
    return configurations


@pytest.fixture
def agent_command(tmp_path, monkeypatch):
    """The command that W&B's agent starts for a point of a sweep, with what it sets for it."""
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(name, "of an earlier run")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "wandb"))
    monkeypatch.setattr(wandb_agent, "AgentProcess", lambda **kwargs: Started(**kwargs))
    agents = {}

    class Started:
        def __init__(self, command, env, forward_signals):
            self.command, self.environment = command, env

    def command(sweep, point, run_id):
        agent = agents.setdefault(sweep["name"], wandb_agent.Agent(api=None, queue=None))
        agent._sweep_command = agent._sweep_command or sweep["command"]
        args = {key: {"value": value} for key, value in point.items()}
        agent._command_run({"run_id": run_id, "program": sweep["program"], "args": args})
        process = agent._run_processes[run_id]
        return process.command, process.environment

    return command


def read(file):
    return yaml.safe_load(file.read_text())


def value_of(value):
    """What hydra reads in a value: a block written as text is a block."""
    return yaml.safe_load(value) if isinstance(value, str) else value


def points(sweep):
    """The first point, the last, and every value of every parameter at least once."""
    values = {key: parameter["values"] for key, parameter in sweep["parameters"].items()}
    first = {key: each[0] for key, each in values.items()}
    last = {key: each[-1] for key, each in values.items()}
    return [first, last, *(first | {key: v} for key, each in values.items() for v in each[1:])]


def multirun_grid(kind):
    """The points of a multirun, as hydra's sweeper makes them of its parameters."""
    params = read(SWEEPS / "multirun" / f"{kind}.yaml")["hydra"]["sweeper"]["params"]
    parser = OverridesParser.create()
    swept = parser.parse_overrides([f"{key}={value}" for key, value in params.items()])
    (jobs,) = BasicSweeper.split_arguments(swept, None)
    parsed = [parser.parse_overrides(job) for job in jobs]
    return [{each.key_or_group: each.value() for each in job} for job in parsed]


def test_the_files_are_there():
    names = {file.stem for file in FILES}
    assert names == {f"{sweep}-{data}" for sweep in BASES for data in ("digits", "cifar10")}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_is_a_sweep_as_wandb_has_them(file):
    sweep = read(file)
    assert set(sweep) == {
        "name", "project", "program", "method", "metric", "parameters", "command",
    }  # fmt: skip
    assert sweep["name"] == file.stem and sweep["method"] == "grid"
    assert sweep["metric"] == {"name": "val_acc1", "goal": "maximize"}
    for key, parameter in sweep["parameters"].items():
        # The names that W&B's own schema of a sweep allows: no '+' of hydra's among them.
        assert re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", key)
        assert set(parameter) == {"values"} and len(parameter["values"]) > 1
        assert len(set(map(str, parameter["values"]))) == len(parameter["values"])
    assert all(isinstance(word, str) for word in sweep["command"])
    assert _validate_config_and_fill_distribution(sweep) == sweep


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_the_agent_starts_is_a_run_of_its_own(file, root, started, agent_command):
    sweep = read(file)
    chosen = points(sweep)[: None if file.stem.endswith("digits") else 2]
    for number, point in enumerate(chosen):
        run_id = f"run{number}"
        command, environment = agent_command(sweep, point, run_id)
        assert command[0] == sweep["program"] == ".venv/bin/grap-solo"
        assert environment["WANDB_RUN_ID"] == run_id
        assert main(command[1:]) == 0
        cfg = started[-1]
        for key, value in point.items():
            assert OmegaConf.select(cfg, key) == value_of(value)
        assert cfg.method == "grap_all4one" and cfg.wandb.enabled
        assert run_dir(cfg).parent == Path("runs") / f"sweep-{file.stem}"
        assert cfg.name.endswith(f"seed{point['seed']}-{run_id}") and "$" not in cfg.name
    assert len({cfg.name for cfg in started}) == len(started) == len(chosen)
    assert {path.name for path in root.iterdir()} <= {"configs", "wandb"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_hydras_multirun_has_the_same_grid(file):
    parameters = read(file)["parameters"]
    values = [map(value_of, each["values"]) for each in parameters.values()]
    product = [dict(zip(parameters, each)) for each in itertools.product(*values)]
    kind, _ = file.stem.split("-")
    assert multirun_grid(kind) == product
    assert parameters == read(SWEEPS / f"{kind}-digits.yaml")["parameters"]


@pytest.mark.parametrize(
    ("kind", "data", "held"),
    [
        ("grap", "cifar10", {"weighting.lr_per_run": 4, "weighting.normalization": "none"}),
        ("methods", "digits", {"seed": 8}),
    ],
)
def test_a_multiruns_jobs_are_runs_of_their_own(kind, data, held, root, started):
    flags = ["--config-path", f"configs/{data}", "--config-name", BASES[kind]]
    flags += ["--config-dir", "configs/sweeps", f"+multirun={kind}"]
    assert main(["pretrain", *flags, *(f"{key}={value}" for key, value in held.items())]) == 0
    jobs = [point for point in multirun_grid(kind) if point.items() >= held.items()]
    assert len({run_dir(cfg) for cfg in started}) == len(started) == len(jobs) > 1
    folder = root / "runs" / f"sweep-{kind}-{data}"
    assert {run_dir(cfg).parent for cfg in started} == {folder.relative_to(root)}
    assert not any(cfg.wandb.enabled or "$" in cfg.name for cfg in started)
    assert [path.name for path in folder.iterdir()] == ["multirun.yaml"]
    assert {path.name for path in root.iterdir()} == {"configs", "runs"}


def test_the_weightings_that_are_swept_over():
    values = read(SWEEPS / "methods-digits.yaml")["parameters"]["weighting"]["values"]
    names = [value_of(value)["name"] for value in values]
    assert set(names) <= set(WEIGHTINGS) and len(set(names)) == len(names) == 13


def test_a_multirun_trains_each_job_and_leaves_its_files_in_one_folder(root, capfd):
    flags = ["--config-path", "configs/digits", "--config-name", "grap"]
    flags += ["--config-dir", "configs/sweeps", "+multirun=grap"]
    small = ["+data.fraction=0.2", "max_epochs=1", "scheduler.warmup_epochs=0"]
    small += ["weighting.lr_per_run=2", "seed=5"]
    assert main(["pretrain", *flags, *small, "weighting.normalization=sum,none"]) == 0
    folder = root / "runs" / "sweep-grap-digits"
    names = {"rate2-sum-seed5": "sum", "rate2-none-seed5": "none"}
    for name, normalization in names.items():
        assert read(folder / name / "config.yaml")["weighting"]["normalization"] == normalization
        assert len((folder / name / "weights.csv").read_text().splitlines()) == 4
        (columns, *_) = csv.reader((folder / name / "metrics.csv").open())
        assert read(SWEEPS / "grap-digits.yaml")["metric"]["name"] in columns
    first, second = ((folder / name / "weights.csv").read_bytes() for name in names)
    assert first != second
    assert {path.name for path in folder.iterdir()} == {*names, "multirun.yaml"}
    assert {path.name for path in root.iterdir()} == {"configs", "runs"}
    # What is there is refused, and the rest is trained all the same.
    capfd.readouterr()
    assert main(["pretrain", *flags, *small, "weighting.normalization=none,gradient"]) == 2
    assert "rate2-none-seed5 already holds a run" in capfd.readouterr().err
    assert (folder / "rate2-gradient-seed5" / "median_weights.yaml").exists()
