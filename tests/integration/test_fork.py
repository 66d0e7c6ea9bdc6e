"""A recognizer that was loaded before a fork, and used in the children."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_folder
import torch

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="this system does not fork"
)

SCRIPT = Path(__file__).with_name("forks.py")


@pytest.fixture(scope="module")
def forked(make_tiny_modules, tmp_path_factory) -> tuple[dict, str]:
    """What the children of one process say, and what was logged. Their
    answers are compared with those of this process."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("forks")
    modules = make_tiny_modules("wav2vec2-large")
    tiny_folder.write(folder / "quantized", modules)
    backends = [p.values[0] for p in tiny_folder.BACKENDS]
    backends = list(filter(tiny_folder.installed, backends))
    for name in backends:
        recognizer = tiny_folder.load(folder / "quantized", name)
        answers = [recognizer(tiny_folder.wave(i)) for i in range(4)]
        torch.save(answers, folder / f"answers-{name}.pt")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), *backends],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.parametrize("backend", tiny_folder.BACKENDS)
def test_unused_parent(forked, backend):
    said, _ = forked
    assert said["unused"][backend] == ["right", "right"]


@pytest.mark.parametrize("backend", tiny_folder.BACKENDS)
def test_used_parent(forked, backend):
    said, _ = forked
    if backend != "openvino":
        assert said["used"][backend] == ["right"]
        return
    # Its threads are not there, and it does not know: it is not asked.
    ((kind, message, seconds),) = said["used"][backend]
    assert kind in ("RuntimeError", "ValueError")
    assert "openvino" in message and "\n" not in message
    assert "load the recognizer after the fork" in message
    assert seconds < 2


def test_each_child_says_that_it_has_one_thread(forked):
    said, log = forked
    lines = [x for x in log.splitlines() if "computes with one thread" in x]
    children = sum(len(x) for rows in said.values() for x in rows.values())
    assert len(lines) == len(set(lines)) == children
