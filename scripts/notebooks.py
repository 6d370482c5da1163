#!/usr/bin/env python
"""Runs the notebooks from their scripts and writes them with their outputs: scripts/notebooks.py

The environment variable EPOCHS shortens every training in them.
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
            cell.metadata.pop("execution", None)  # When it ran, to the millisecond.
            if cell.cell_type == "code":  # Warnings name the machine's folders.
                cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
        nbformat.write(notebook, script.with_suffix(".ipynb"))
        print(script.with_suffix(".ipynb").relative_to(FOLDER.parent))


if __name__ == "__main__":
    main()
