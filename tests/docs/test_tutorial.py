"""The cells of the tutorial run in order."""

import json
import logging
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
TORCH, OURS = "torch, dynamic", "stablequant, mse"


@pytest.fixture
def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_outputs_are_small_and_hold_no_paths(cells):
    for cell in cells:
        for output in cell.get("outputs", []):
            text = "".join(output["text"])
            assert len(text) < 1000
            assert "/tmp" not in text and str(ROOT) not in text


@pytest.mark.slow
def test_cells(cells, monkeypatch, capsys, tmp_path):
    pytest.importorskip("openvino", reason="needs the extra cpu")
    monkeypatch.chdir(NOTEBOOK.parent)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = logging.root.level
    names = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            code = "".join(cell["source"])
            exec(compile(code, f"cell {number}", "exec"), names)
    logging.root.setLevel(before)
    results = names["results"]
    if TORCH not in results:
        assert "has no quantize_dynamic" in capsys.readouterr().out
    assert {"float32", OURS} == results.keys() - {TORCH}
    for name, (wer, factor) in results.items():
        # The demo's recognizer makes few errors in float.
        assert wer < 8, name
        assert factor > 0
    assert names["made"].report.is_file()
