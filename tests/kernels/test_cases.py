"""Runs the files of ``cases``, and the runtime's tests, in the interpreter.

With a CUDA device the same files are collected directly and run on it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
FILES = sorted((HERE / "cases").glob("test_*.py"))
FILES.append(HERE / "test_triton_runtime.py")


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the files run on the CUDA device"
)
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1",
    reason="this process runs the files in the interpreter",
)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_in_the_interpreter(file):
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "pytest", "-q", str(file)),
            *("-p", "no:cacheprovider", "--durations=3"),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=280,
    )
    print(done.stdout[-6000:], done.stderr[-2000:])
    assert done.returncode == 0
    assert " passed" in done.stdout
    assert "failed" not in done.stdout
