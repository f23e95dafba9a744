"""The examples run: the short file on generated data, the notebooks as a reader would run them."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

import gfml

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
DATA = ROOT.parent / "shared" / "data"


def test_the_short_example_learns_and_stays_short() -> None:
    file = EXAMPLES / "gravity_lastfm.py"
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 110
    spec = importlib.util.spec_from_file_location("gravity_lastfm", file)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    data = gfml.load_dataset("demo", demo_users=300, demo_items=150, demo_interactions=9000)
    first, later = (example.run(data, epochs=epochs, lr=2e-2, batch=256) for epochs in (1, 15))
    assert later["recall@20"] > 1.2 * first["recall@20"] > 0 and later == example.run(
        data, epochs=15, lr=2e-2, batch=256
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.ipynb")))
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    if 'load_dataset("lastfm")' in str(notebook) and not (DATA / "lastfm").is_dir():
        pytest.skip("needs the Last.fm data")
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code"), "store it without outputs"
    monkeypatch.setenv("GFML_DATA", str(DATA))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    nbclient.NotebookClient(notebook, timeout=540, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
