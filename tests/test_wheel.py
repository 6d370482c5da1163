"""The wheel, built from the sdist: its files, and a run of it outside the clone."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile

import pytest
from helpers import ROOT

pytestmark = pytest.mark.slow

BUILD = "from setuptools import build_meta; build_meta.build_{}('dist')"
OUTSIDE = ("tests", "docs", "build", "dist", "runs", "grap_solo.egg-info", "__pycache__")


def start(*line, cwd):
    """Runs a program that sees no PYTHONPATH, and returns what it prints."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, line)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd,
        env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of an sdist of this clone's files; the clone itself is left alone."""
    root = tmp_path_factory.mktemp("wheel")
    for name in ("grap_solo", "configs"):
        files = (ROOT / name).rglob("*")
        for file in files:
            if file.is_file() and not {*file.relative_to(ROOT).parts} & {*OUTSIDE}:
                copy = root / file.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(file.read_bytes())
    for file in ROOT.iterdir():
        if file.is_file():
            (root / file.name).write_bytes(file.read_bytes())
    start(sys.executable, "-c", BUILD.format("sdist"), cwd=root)
    (sdist,) = (root / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as opened:
        opened.extractall(root / "unpacked", filter="data")
    (unpacked,) = (root / "unpacked").iterdir()
    start(sys.executable, "-c", BUILD.format("wheel"), cwd=unpacked)
    (built,) = (unpacked / "dist").glob("*.whl")
    return built


def test_it_holds_every_module_and_every_configuration(wheel):
    with zipfile.ZipFile(wheel) as opened:
        found = {name for name in opened.namelist() if ".dist-info/" not in name}
    package = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "grap_solo").rglob("*")
        if file.suffix in {".py", ".typed", ".j2"}
    }
    configs = {file.relative_to(ROOT).as_posix() for file in (ROOT / "configs").rglob("*.yaml")}
    assert found == package | {f"grap_solo/{name}" for name in configs}


def test_it_trains_from_its_own_configurations_outside_the_clone(wheel, tmp_path):
    venv.create(tmp_path / "venv", system_site_packages=True, with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    line = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel]
    start(*line, cwd=tmp_path)
    # The tests' interpreter may be a virtual environment too, whose packages such a one inherits
    # not. A .pth file in it, such as that of a clone installed in place, is not read from here.
    own = start(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd="/")
    packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    with open(os.path.join(own.strip(), "tests.pth"), "w") as file:
        file.write("\n".join(sorted(packages)))
    where = start(python, "-c", "import grap_solo; print(grap_solo.__file__)", cwd=tmp_path)
    assert where.startswith(str(tmp_path / "venv"))
    command = tmp_path / "venv" / "bin" / "grap-solo"
    changes = ["max_epochs=1", "scheduler.warmup_epochs=0", "+data.fraction=0.2", "name=run"]
    start(command, "pretrain", "digits/grap_vicreg", *changes, cwd=tmp_path)
    run = tmp_path / "runs" / "run"
    assert (run / "trained.json").exists() and (run / "median_weights.yaml").exists()
    assert "digits/grap_vicreg\n" in start(command, "configs", cwd=tmp_path)
