"""Hydra's flags and overrides on the command line, and values that need quotes."""

import re
import shutil
import subprocess

import pytest
from helpers import DIGITS
from hydra.core.override_parser.overrides_parser import OverridesParser

from grap_solo.arguments import build_parser
from grap_solo.cli import main
from grap_solo.compose import readable_overrides
from grap_solo.errors import ConfigError
from grap_solo.training.checkpoints import epoch_checkpoints

FILE = [["--config-path", str(DIGITS)], ["--config-name", "grap"]]
SHOW = ["--cfg", "job"]
ORDERS = {
    "flags first": [*FILE, SHOW, ["seed=7"], ["name=x"]],
    "flags last": [["seed=7"], ["name=x"], SHOW, *FILE],
    "config-path last": [["seed=7"], SHOW, FILE[1], ["name=x"], FILE[0]],
    "short flags": [["seed=7"], ["-c", "job"], ["name=x"], ["-cn", "grap"], ["-cp", str(DIGITS)]],
    "equals signs": [["seed=7", "--cfg=job", "name=x", "--config-name=grap", f"-cp={DIGITS}"]],
}


@pytest.mark.parametrize("order", ORDERS)
def test_flags_and_overrides_stand_in_any_order(order, capfd):
    assert main(["pretrain", *(word for part in ORDERS[order] for word in part)]) == 0
    out = capfd.readouterr().out
    assert "\nseed: 7\n" in out and "name: x\n" in out


def test_a_multirun_behind_its_overrides_starts_every_job(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    line = ["pretrain", *FILE[0], "max_epochs=0,-1", "--multirun", *FILE[1]]
    assert main(line) == 2
    errors = capfd.readouterr().err.splitlines()
    assert ["got 0" in errors[0], "got -1" in errors[1], len(errors)] == [True, True, 2]


CLASHING = {
    "--multirun --cfg job": "--cfg/-c: not allowed with argument --multirun",
    "--info --cfg job": "--cfg/-c: not allowed with argument --info",
    "--run --multirun": "--multirun/-m: not allowed with argument --run",
    "--resolve": "--resolve goes with --cfg",
    "--experimental-rerun nowhere": "--experimental-rerun: no such file 'nowhere'",
    "--max_epochs=5": "'--max_epochs': a key of the configuration has no dashes: write max_epochs=",
    "--max_epochs 5": "a key of the configuration has no dashes: write max_epochs=5",
    "-seed=5": "'-seed': a key of the configuration has no dashes: write seed=5",
    "--package data": "--package goes with --cfg",
    "--shell-completion": "--shell-completion needs to know for which shell",
    "--cfgs=job": "unknown flag '--cfgs': did you mean --cfg?",
    "=3": "=3: not an override (no key)",
    "devices=[0": "a list or block ends with its bracket; a text with",
    "hydra/launcher=nowhere": "Could not find 'hydra/launcher/nowhere'",
    "--config-name digits/nothing": "Cannot find primary config 'digits/nothing'",
    "é=3": "é=3: not an override",
    "name=[x]": "name: expected a text, got ['x']: put a text into quotes: \"name='...'\"",
    "name=''": "name: expected a text, got an empty text: give one",
    "name=5": "name: expected a text, got 5: put a text into quotes",
}


@pytest.mark.parametrize("words", CLASHING)
def test_what_hydra_does_not_take_is_one_line(words, capfd):
    line = ["pretrain", *FILE[0], *FILE[1], "seed=1", "checkpoint.dir=/dev/null", *words.split()]
    assert main(line) == 2
    error = capfd.readouterr().err
    assert CLASHING[words] in error and error.count("\n") == 1


def test_a_missing_package_of_the_trainer_is_one_line(tmp_path, capfd):
    line = ["pretrain", *FILE[0], *FILE[1], f"checkpoint.dir={tmp_path}", "accelerator=tpu"]
    assert main(line) == 2
    error = capfd.readouterr().err
    assert "trainer: a package is missing for what its keys ask for: Requirement" in error


@pytest.mark.parametrize("command", ["retrain", "finetune", "compare", "search"])
def test_a_key_with_dashes_is_explained_by_every_command(command):
    _, commands = build_parser()
    with pytest.raises(ConfigError, match="no dashes: write max_epochs=5"):
        commands[command].parse(["--max_epochs=5", *FILE[0], *FILE[1]])


UNREADABLE = [
    "a=b", "run-ep=3.ckpt", "[x]/y", "x]", "{a}", "a#b", "a'b", 'a"b', "'\"", "é", "a(b)", "a;b",
    "$a=`b`", "=\\", "\\\\'=\\\\", "!=",
]  # fmt: skip


@pytest.mark.parametrize("value", UNREADABLE)
@pytest.mark.parametrize("key", ["checkpoint.dir", "+resume_from_checkpoint"])
def test_a_value_that_needs_quotes_is_shown_in_quotes_that_work(key, value):
    with pytest.raises(ConfigError) as caught:
        readable_overrides([f"{key}={value}"])
    start, _, shown = str(caught.value).partition("needs quotes: ")
    assert start.startswith(f"{key.lstrip('+')}: hydra cannot read {value} (")
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    typed = subprocess.run(["bash", "-c", f"printf %s {shown}"], capture_output=True, text=True)
    assert readable_overrides([typed.stdout]) == [typed.stdout]
    read = OverridesParser.create().parse_override(typed.stdout)
    assert (read.input_line.partition("=")[0], read.value()) == (key, value)


@pytest.mark.parametrize("command", ["compare", "search"])
def test_every_command_that_takes_overrides_shows_the_quotes(command, tmp_path, capfd):
    line = [command, *([str(tmp_path)] * (command == "search")), *FILE[0], *FILE[1]]
    grid = ["methods=[fixed]", "seeds=[1]"] if command == "compare" else []
    assert main([*line, *grid, "name=a#b"]) == 2
    assert "name: hydra cannot read a#b" in (error := capfd.readouterr().err)
    assert error.count("\n") == 1
    if grid:
        assert main([*line, "methods=[fixed", "seeds=[1]"]) == 2
        assert "methods: cannot read [fixed: " in capfd.readouterr().err


def test_a_home_folder_needs_no_quotes():
    assert readable_overrides(["a=~/é x", "~b", "c=1"]) == ["a='~/é x'", "~b", "c=1"]


def test_a_new_folder_may_have_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    _, commands = build_parser()
    flags = [*FILE[0], *FILE[1]]
    for folder in ("./lr=1", "/runs/lr=1", "../a=b", "runs/lr=1", "a?b#c%d=e {x}", "runs/x=[1]"):
        given = commands["search"].parse(["seed=1", folder, *flags, "~scheduler", "+a/b@c.d=2"])
        assert str(given.directory) == re.sub(r"^\./", "", folder)
        assert given.overrides == ["seed=1", "~scheduler", "+a/b@c.d=2"]
    with pytest.raises(ConfigError, match="DIRECTORY: write ./NAME=VALUE for a folder"):
        commands["search"].parse(["lr=1", *flags])


@pytest.mark.parametrize("name", ["run", "run-ep3", "run-ep=3", "run-ep", "x7", "a[b]", "a.b*"])
def test_the_newest_checkpoint_is_found_among_old_and_new_names(name, tmp_path):
    ours = ["-ep11", "-ep=10", "-ep9", "-ep=9", "-ep=2", "-ep1"]
    others = ["-interrupted", "-ep", "-ep=", "-ep\u00b2", "-ep5x", "ep7"]
    for end in [*others, *ours]:
        (tmp_path / f"{name}{end}.ckpt").touch()
    (tmp_path / f"{name}-ep12.ckpt.new").touch()
    found = [path.name for path in epoch_checkpoints(tmp_path)]
    assert found == [f"{name}{end}.ckpt" for end in ours]
    for path in found:
        if "=" not in path and "[" not in path:
            readable_overrides([f"+resume_from_checkpoint=runs/{name}/{path}"])  # Unquoted.


def test_hydras_own_folders_are_expanded_too(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    sweep = ["--config-dir", str(DIGITS.parent), "+sweeps/multirun=grap", "--multirun"]
    line = ["pretrain", *FILE[0], *FILE[1], *sweep, "checkpoint.dir=~/runs", "max_epochs=0"]
    assert main(line) == 2
    assert "max_epochs: expected" in capfd.readouterr().err
    assert (tmp_path / "home" / "runs" / "multirun.yaml").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
