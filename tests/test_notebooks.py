"""The notebooks of docs/notebooks run from their first cell to their last, without a network."""

import os
import sys
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parent.parent / "docs" / "notebooks"
SHORTER = {  # in fine_tune.ipynb, of which no cell needs the numbers
    "--steps 40": "--steps 2 --warmup_steps 0",
    "--prompts box click1": "--prompts box click1 --limit 2",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in NOTEBOOKS.glob("*.ipynb")))
def test_notebook_runs(name, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    # Where the kernel finds the command `efficientsam` of this environment.
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    for place in reversed([i for i, cell in enumerate(notebook.cells) if cell.source.startswith("!")]):
        check = nbformat.v4.new_code_cell("assert _exit_code == 0")  # a command's failure does not end a notebook
        for text, shorter in SHORTER.items():
            notebook.cells[place].source = notebook.cells[place].source.replace(text, shorter)
        notebook.cells.insert(place + 1, check)
    resources = {"metadata": {"path": NOTEBOOKS}}  # the working directory
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
