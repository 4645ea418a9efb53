"""The notebook on learned merging runs from top to bottom, in a kernel of its own, on digits."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.slow
def test_learned_merging_runs(monkeypatch):
    monkeypatch.delenv("JAXMERGE_VISION_DATA", raising=False)
    notebook = nbformat.read(DOCS / "learned-merging.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "keep the notebook without outputs"
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(DOCS)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2  # the entropy along the run, and the heat map
    tables = [output["text"] for output in outputs if output.get("name") == "stdout"]
    mean = {line[:22].strip(): float(line.split()[-1]) for line in tables[-1].splitlines()[1:]}
    assert mean["base"] < mean["experts"] and mean["experts"] > 0.8
    assert list(mean)[-1] == "learned by layer" and mean["learned by layer"] > mean["base"]
