"""A torchaudio that does not load beside torch is one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from speechbrain_stablequant.utils.versions import pair_error

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "LibriSpeech" / "ASR" / "CTC"
LINE = (
    "torch 2.11.0 and torchaudio 2.11.1 do not load together: "
    'pip install "torchaudio==2.11.0"'
)


@pytest.fixture
def python(tmp_path, monkeypatch):
    """Runs Python where torchaudio fails as it does beside torch 2.11.0."""
    for name, version in (("torch", "2.11.0"), ("torchaudio", "2.11.1")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
    package = tmp_path / "torchaudio"
    package.mkdir()
    (package / "__init__.py").write_text("raise OSError('undefined symbol')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=RECIPE
        )

    return run


def test_the_recipe_ends_with_one_line(python):
    done = python("train.py", "hparams/quant.yaml")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == LINE + "\n"


def test_public_names_say_the_same(python):
    done = python("-c", "from speechbrain_stablequant import StableQuant")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"ImportError: {LINE}"


def test_importing_the_package_imports_nothing_heavy(python):
    done = python(
        "-c",
        "import sys, speechbrain_stablequant\n"
        "print({'torch', 'torchaudio', 'speechbrain'} & {*sys.modules})",
    )
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    ("torch", "torchaudio", "cure"),
    [
        ("2.8.0", "2.11.0", "torchaudio==2.8.0"),
        ("2.9.1", "2.11.0", "torchaudio==2.9.1"),
        ("2.12.1", "2.11.1", "torchaudio==2.11.0"),
        ("2.13.0+cpu", "2.10.0", "torchaudio>=2.11.1"),
        ("2.15.0", "2.11.0", "torchaudio>=2.11.1"),
        ("2.16.0.dev20261201", "2.11.0", "torchaudio>=2.11.1"),
        ("2.15.0", None, "torchaudio>=2.11.1"),
    ],
)
def test_names_what_to_install(torch, torchaudio, cure):
    line = pair_error(torch, torchaudio, "no reason")
    assert line.endswith(f': pip install "{cure}"')
    assert torch in line and str(torchaudio or "needs") in line


def test_a_pair_that_ought_to_load_is_told_with_the_reason():
    line = pair_error("2.13.0+cpu", "2.11.1+cu132", "libc10_cuda.so: no")
    assert "(libc10_cuda.so: no)" in line
    assert line.endswith("--force-reinstall torch torchaudio")
