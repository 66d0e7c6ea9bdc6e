"""The documentation builds without a warning, links between pages included."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sphinx")
pytest.importorskip("myst_parser")
pytest.importorskip("furo")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_site(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "docs", tmp_path]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    shown = (tmp_path / "api.html").read_text(encoding="utf-8")
    for name in ("quantize_pretrained", "CommonConfig", "Recognizer"):
        assert name in shown
