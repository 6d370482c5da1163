"""Names, paths, folders and text files: what cannot be used is one line, before any training."""

import errno
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from helpers import DIGITS, QUIET, digits
from omegaconf import OmegaConf

from grap_solo.arguments import build_parser
from grap_solo.cli import main
from grap_solo.errors import ConfigError
from grap_solo.experiments.grid import plan, read_grid
from grap_solo.methods import find_method
from grap_solo.records.files import check_name, make_folder, only_one
from grap_solo.records.weights import read_median
from grap_solo.training import config
from grap_solo.training.checkpoints import find_start
from grap_solo.training.config import PATH_KEYS, prepare, run_dir
from grap_solo.training.run import pretrain
from grap_solo.training.schema import schema_of
from grap_solo.weighting import find_weighting

STRANGE = "a?b#c%d=e {x}[y] é"
"""A folder's name of characters that have a meaning for URLs, globs, hydra or shells."""

SMALLEST = ["+data.fraction=0.2", "max_epochs=1", "scheduler.warmup_epochs=0", *QUIET]
FILE = ["--config-path", str(DIGITS), "--config-name", "grap_vicreg"]
LATIN = "# caf\xe9\n".encode("latin-1")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def run(home):
    """A run whose folder was given as ``~/...$PLACE``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("PLACE", STRANGE)
        return pretrain(digits("~/$PLACE", *SMALLEST[1:3], *QUIET, "name=run", file="grap_vicreg"))


def refused(arguments, capfd):
    """Runs a command that refuses its input, and returns the one line that it prints."""
    capfd.readouterr()
    assert main(list(map(str, arguments))) == 2
    error = capfd.readouterr().err
    assert error.startswith("grap-solo: ") and error.count("\n") == 1, error
    return error


# ---- names ----------------------------------------------------------------------------------

BAD_NAMES = [
    "", ".", "..", "a/k", "../up", "/abs", "a\\k", " a", "a ", "a\nb", "a\tb", "a\0b", "\udcff",
    "x" * 231, "é" * 116,
]  # fmt: skip
GOOD_NAMES = [
    "grap-digits", "lr0.1-sum-seed5-1a2b3c", "seed=1,weighting.lr=0.1", ".hidden", "-x", "a b", "é",
    "x" * 230, "run-ep3", "[x]", "a$b",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_name_that_cannot_name_a_folder_is_refused(name, tmp_path):
    cfg = digits(tmp_path)
    cfg.name = name
    with pytest.raises(ConfigError, match=r"^name: ('.*': it |expected a text, got )"):
        prepare(cfg)
    with pytest.raises(ConfigError, match=r"^definitions: '.*': it "):
        plan(digits(tmp_path), ["fixed"], [1], {name: {}})


@pytest.mark.parametrize("name", GOOD_NAMES, ids=ascii)
def test_a_name_that_hydra_or_an_agent_makes_is_taken(name, tmp_path):
    check_name(name)
    # The longest file that is called after it.
    (tmp_path / f"{name}-interrupted.ckpt.new").touch()


COMMANDS = {
    "pretrain": ["pretrain", *FILE],
    "compare": ["compare", *FILE, "methods=[fixed]", "seeds=[1]"],
    "search": ["search", "found", *FILE],
    "retrain": ["retrain", "RUN"],
    "finetune": ["finetune", "RUN"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["a/k", "../up", ""])
def test_every_command_refuses_such_a_name_and_makes_nothing(
    command, name, run, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    line = [str(run.directory) if each == "RUN" else each for each in COMMANDS[command]]
    line += ["checkpoint.dir=runs", f"name={name}"]
    told = rf"grap-solo: name: ('{re.escape(name)}': it |expected a text, got an empty text)"
    assert re.match(told, refused(line, capfd))
    assert list(tmp_path.iterdir()) == []


# ---- paths ----------------------------------------------------------------------------------


def path_fields(model, block=""):
    """The keys of a configuration that are texts and, by their names, paths."""
    for name, field in model.model_fields.items():
        inner = config_block(field)
        if inner is not None:
            yield from path_fields(inner, f"{block}{name}.")
        elif re.search("path|dir$|checkpoint|extractor", name):
            yield block + name


def config_block(field):
    from grap_solo.training.blocks import block_of

    return block_of(field)


def test_every_path_of_the_schema_is_expanded():
    model = schema_of(find_method("grap_all4one"), find_weighting("grap"))
    assert {*path_fields(model)} == {*PATH_KEYS}


GIVEN = {
    "~/a": "HOME/a",
    "~": "HOME",
    "$PLACE/a": "there/a",
    "x/${PLACE}": "x/there",
    "$HOME_/a/$PLACE$PLACE": "under/a/therethere",
    "~/$ODD": "HOME/$NOT ~/a",  # A variable's value is taken as it is.
    "a~b/c$": "a~b/c$",
    "./~": "./~",
}


@pytest.mark.parametrize("key", PATH_KEYS)
@pytest.mark.parametrize("given", GIVEN)
def test_home_and_variables_are_replaced_in_every_path(key, given, tmp_path, monkeypatch):
    values = {"HOME": tmp_path, "PLACE": "there", "HOME_": "under", "ODD": "$NOT ~/a"}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    cfg = OmegaConf.create({"data": {}, "checkpoint": {}, "name": "x"})
    OmegaConf.update(cfg, key, given.replace("${", "\\${"))
    OmegaConf.set_struct(cfg, True)
    found = OmegaConf.select(config.expand_paths(cfg), key)
    assert found == GIVEN[given].replace("HOME", str(tmp_path), 1)
    assert OmegaConf.select(cfg, key) == given  # The source is left unchanged.


BAD_PATHS = {
    "$NOT_SET/a": "the variable NOT_SET is not set",
    "~nobody-here/a": "no such user",
    "": "an empty text",
    "a\0b": "control character",
    "a\nb": "control character",
    "\udcff": "not UTF-8",
    "x" * 300: "File name too long",
}


@pytest.mark.parametrize("path", BAD_PATHS, ids=lambda path: ascii(path[:20]))
@pytest.mark.parametrize("key", PATH_KEYS)
def test_a_path_that_no_system_takes_names_its_key(key, path, tmp_path):
    cfg = digits(tmp_path)
    OmegaConf.update(cfg, key, path, force_add=True)
    with pytest.raises(ConfigError) as caught:
        prepare(cfg)
    assert str(caught.value).startswith(f"{key}: ") and BAD_PATHS[path] in str(caught.value)


def test_a_folder_that_has_the_variables_name_itself_is_still_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a$b").mkdir()
    assert prepare(digits("a$b")).checkpoint.dir == "a$b"


@pytest.mark.parametrize("folder", ["s3://bucket/runs", "a::b"])
def test_an_address_of_remote_files_is_refused(folder):
    with pytest.raises(ConfigError, match=r"^checkpoint\.dir: '.*folder of this machine"):
        prepare(digits(folder))


PATH_FLAGS = {
    "directory": ["search", "PATH", *FILE],
    "config_path": ["compare", "--config-path", "PATH", "--config-name", "x"],
    "config_dir": ["pretrain", "--config-dir", "PATH"],
    "runs": ["retrain", "PATH"],
    "folders": ["report", "PATH"],
    "output": ["report", "~", "--output", "PATH"],
    "json": ["bench", "step", "--json", "PATH"],
    "script": ["run", "PATH"],
}


@pytest.mark.parametrize("flag", PATH_FLAGS)
def test_the_command_lines_paths_are_expanded_alike(flag, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", STRANGE)
    (tmp_path / STRANGE).mkdir()
    (tmp_path / STRANGE / "config.yaml").touch()
    name, *line = PATH_FLAGS[flag]
    _, commands = build_parser()
    given = commands[name].parse([each.replace("PATH", "~/$PLACE") for each in line])
    found = getattr(given, flag)
    assert (found[0] if isinstance(found, list) else found) == tmp_path / STRANGE
    with pytest.raises(ConfigError, match="the variable NOT_SET is not set"):
        commands[name].parse([each.replace("PATH", "$NOT_SET/a=b") for each in line])


def test_all_that_a_run_writes_has_the_same_paths(run, home, monkeypatch):
    folder = str(home / STRANGE)
    assert run.directory == Path(folder) / "run"
    saved = yaml.safe_load((run.directory / "config.yaml").read_text(encoding="utf-8"))
    written = json.loads((run.directory / "checkpoints" / "args.json").read_text(encoding="utf-8"))
    assert saved["checkpoint"]["dir"] == written["checkpoint"]["dir"] == folder

    # The run is found again, whichever way its folder is given.
    monkeypatch.setenv("HOME", str(home))
    cfg = digits("~", *SMALLEST[1:3], *QUIET, "name=run", file="grap_vicreg")
    for path in (f"~/{STRANGE}", folder):
        cfg.checkpoint.dir = path
        with pytest.raises(ConfigError, match="already holds a run: give another name"):
            pretrain(cfg)

    cells = plan(cfg, ["fixed", "grap_tuned"], [1], {})
    assert {cell.directory.parent for cell in cells} == {Path(folder) / "run"}


def test_a_run_of_an_older_version_goes_on_from_its_checkpoint(run, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(run.directory, directory)
    (directory / "trained.json").unlink()
    checkpoint = directory / "checkpoints" / "run-ep0.ckpt"
    older = checkpoint.rename(checkpoint.with_name("run-ep=0.ckpt"))
    source = OmegaConf.load(directory / "config.yaml")
    start = find_start(source, prepare(source), directory)
    assert (start.path, start.epoch) == (older, 1)


# ---- folders --------------------------------------------------------------------------------


def full_disk(folder):
    """Mounts a disk without room, if this process may."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)], capture_output=True
    )
    if done.returncode:
        pytest.skip("this process may not mount a disk")


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount")
def test_a_full_disk_is_told_before_the_training(tmp_path, capfd):
    full_disk(tmp_path)
    try:
        line = ["pretrain", *FILE, *SMALLEST, f"checkpoint.dir={tmp_path}", "name=a"]
        assert "checkpoint.dir: " in (error := refused(line, capfd))
        assert "cannot be written to (No space left on device): make room" in error
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_folder_that_takes_no_file_is_one_line(code, tmp_path, monkeypatch):
    def fail(handle):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ConfigError) as caught:
        make_folder(tmp_path / "new", "--output")
    assert str(caught.value).startswith(f"--output: {tmp_path}/new cannot be written to (")
    assert os.strerror(code) in str(caught.value)
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.skipif(not os.path.isdir("/sys/kernel"), reason="no folder refuses every user")
@pytest.mark.parametrize("name", ["", "new"])
def test_a_folder_that_nobody_may_write_to_is_one_line(name):
    with pytest.raises(ConfigError, match="^key: /sys/kernel.* cannot be (made|written to)"):
        make_folder(Path("/sys/kernel", name), "key")


OUTPUTS = {
    "pretrain": (["pretrain", *FILE, *SMALLEST, "checkpoint.dir=OUT"], "checkpoint.dir: "),
    "retrain": (["retrain", "RUN", "checkpoint.dir=OUT"], "checkpoint.dir: "),
    "finetune": (["finetune", "RUN", "checkpoint.dir=OUT"], "checkpoint.dir: "),
    "compare": (
        ["compare", *FILE, "methods=[fixed]", "seeds=[1]", "checkpoint.dir=OUT"], "checkpoint.dir: "
    ),
    "search": (["search", "OUT", *FILE], "search: "),
    "report": (["report", "RUN", "--output", "OUT"], "--output: "),
    "bench": (["bench", "step", "--json", "OUT/x.json"], "--json: "),
    "demo": (["demo"], "demo: "),
}  # fmt: skip


@pytest.mark.parametrize("command", OUTPUTS)
def test_a_file_in_the_place_of_a_folder_is_one_line(command, run, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("a file")
    line, key = OUTPUTS[command]
    places = {"RUN": str(run.directory)}
    line = [places.get(each, each.replace("OUT", "runs")) for each in line]
    error = refused(line, capfd)
    assert error.startswith(f"grap-solo: {key}runs") and "cannot be made: " in error
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_file_that_cannot_be_written_later_on_is_one_line_too(run, tmp_path, capfd):
    (tmp_path / "report.html").mkdir()
    error = refused(["report", run.directory, "--output", tmp_path], capfd)
    assert f"{tmp_path}/report.html: cannot be read or written: Is a directory" in error


def test_a_file_system_without_locks_is_told_from_a_second_command(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", fail)
    with pytest.raises(ConfigError, match="cannot be locked"), only_one(tmp_path):
        pass


@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
def test_compiling_without_a_compiler_is_one_line(accelerator, tmp_path, monkeypatch):
    from torch._inductor import cpp_builder

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    search = cpp_builder.cpp_compiler_search
    getattr(search, "cache_clear", lambda: None)()
    with pytest.raises(ConfigError, match="performance.compile: torch finds no C.* compiler"):
        prepare(digits(tmp_path, "+performance.compile=true", f"accelerator={accelerator}"))


# ---- texts ----------------------------------------------------------------------------------


def test_a_configuration_that_is_not_utf8_is_named_also_if_another_includes_it(tmp_path, capfd):
    (tmp_path / "bad.yaml").write_bytes(b"name: x\n" + LATIN)
    (tmp_path / "whole.yaml").write_text("defaults:\n  - bad\n  - _self_\n")
    (tmp_path / "grid.yaml").write_text("base: bad.yaml\nmethods: [fixed]\nseeds: [1]\nname: g\n")
    there = ["--config-path", tmp_path, "--config-name"]
    for line in (
        ["pretrain", *there, "bad"],
        ["pretrain", *there, "whole"],
        ["compare", *there, "bad"],
        ["compare", *there, "grid"],
        ["search", tmp_path / "found", *there, "whole"],
    ):
        assert refused(line, capfd) == (
            f"grap-solo: {tmp_path}/bad.yaml: it is not UTF-8 text: save it as UTF-8\n"
        )


@pytest.mark.parametrize("file", ["config.yaml", "weights.csv"])
def test_a_runs_file_that_is_not_utf8_is_named(file, run, tmp_path, capfd):
    copy = tmp_path / "copy"
    shutil.copytree(run.directory, copy)
    with (copy / file).open("ab") as opened:
        opened.write(LATIN)
    for line in (["retrain", copy], ["report", copy, "--output", tmp_path / "page"]):
        error = refused(line, capfd)
        assert error.startswith(f"grap-solo: {copy / file}: ")
        assert "not UTF-8" in error or "not a CSV file" in error


def test_medians_and_grids_that_are_not_utf8_are_named(tmp_path):
    file = tmp_path / "median_weights.yaml"
    file.write_bytes(b"weighting: {name: fixed, weights: {a: 1}}\n" + LATIN)
    for read in (read_median, lambda path: read_grid(path, [], None)):
        with pytest.raises(ConfigError, match=f"^{file}: it is not UTF-8 text"):
            read(file)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "a: ${b"], ids=["list", "cut", "key"])
def test_a_runs_configuration_that_holds_no_keys_is_one_line(text, tmp_path, capfd):
    (tmp_path / "config.yaml").write_text(text)
    error = refused(["retrain", tmp_path], capfd)
    assert "config.yaml" in error


def test_run_dir_is_the_name_in_the_folder_of_all_runs():
    assert run_dir(OmegaConf.create({"checkpoint": {"dir": "a"}, "name": "b"})) == Path("a/b")
