"""The notebooks run, and each is the same as the script it is paired with."""

import shutil
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient
from omegaconf import OmegaConf

FOLDER = Path(__file__).parents[1] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("*.py"))


def test_there_are_three():
    assert [path.stem[:1] for path in SCRIPTS] == ["1", "2", "3"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_and_notebook_are_one_and_its_outputs_are_there(script):
    pair = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    cells = jupytext.read(script).cells
    assert [(c.cell_type, c.source) for c in pair.cells] == [(c.cell_type, c.source) for c in cells]
    code = [cell for cell in pair.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs and not any(output.output_type == "error" for output in outputs)
    text = script.with_suffix(".ipynb").read_text()
    assert "/tmp/" not in text and "/home/" not in text and "/work/" not in text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder beside a copy of ``configs/`` in which the digits are few: 3 steps an epoch."""
    root = tmp_path_factory.mktemp("few")
    shutil.copytree(FOLDER.parent / "configs", root / "configs")
    file = root / "configs" / "common" / "digits.yaml"
    text = file.read_text().replace("dataset: digits", "dataset: digits\n  fraction: 0.1")
    file.write_text(text.replace("batch_size: 64", "batch_size: 32"))
    assert OmegaConf.load(file).data.fraction == 0.1
    assert OmegaConf.load(file).optimizer.batch_size == 32
    (root / "notebooks").mkdir()
    return root / "notebooks"


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_notebook_runs(script, folder, monkeypatch):
    monkeypatch.setenv("EPOCHS", "1")
    notebook = jupytext.read(script)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}})
    client.execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
