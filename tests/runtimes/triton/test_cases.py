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
#: One process for each: most of a short one's time would go into imports.
GROUPS = {
    "trial": [HERE / "cases" / "test_trial.py"],
    "operators": [HERE / "cases"],
    "runtime": [HERE / "test_triton_runtime.py"],
}
SLOW = pytest.mark.slow


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the files run on the CUDA device"
)
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1",
    reason="this process runs the files in the interpreter",
)
@pytest.mark.parametrize(
    "group",
    [
        "trial",
        pytest.param("operators", marks=SLOW),
        pytest.param("runtime", marks=SLOW),
    ],
)
def test_in_the_interpreter(group):
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "pytest", "-q", *map(str, GROUPS[group])),
            *("-n0", "-p", "no:cacheprovider", "--durations=10"),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parents[2],
        capture_output=True,
        text=True,
        timeout=900,
    )
    print(done.stdout[-6000:], done.stderr[-2000:])
    assert done.returncode == 0
    assert " passed" in done.stdout
    assert "failed" not in done.stdout
