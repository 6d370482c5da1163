#!/usr/bin/env python
"""Runs the notebooks' scripts and writes the notebooks with their outputs: scripts/notebooks.py

The environment variable EPOCHS shortens every training.
"""

from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"


def main() -> None:
    for script in sorted(FOLDER.glob("*.py")):
        notebook = jupytext.read(script)
        NotebookClient(notebook, timeout=None, resources={"metadata": {"path": FOLDER}}).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # Times of execution, which differ each time.
            if cell.cell_type == "code":  # Warnings, which name folders of this machine.
                cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
        nbformat.write(notebook, script.with_suffix(".ipynb"))
        print(script.with_suffix(".ipynb").relative_to(FOLDER.parent))


if __name__ == "__main__":
    main()
