"""Loads recognizers, forks, and lets the children use them; then uses them
itself, and forks again.

Prints one JSON object: what each child said, by "unused" and "used" parent and
by backend.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_folder
import torch
from torch import nn

#: Of each kind: two read from one open file if the parent has not.
CHILDREN = {"unused": 2, "used": 1}
#: Seconds after which children are said to hang.
PATIENCE = 120
INPUTS = range(4)


def recognize(
    recognizer: nn.Module, expected: list[torch.Tensor], first: int
) -> Any:
    """What a child says: "right", the inputs with a wrong answer, or the
    error and the seconds until it came."""
    # As reading audio does before the recognizer is called.
    torch.randn(1000, 1000).mean(1)
    began = time.perf_counter()
    try:
        wrong = [
            i
            for i in sorted(INPUTS, key=lambda i: (i + first) % len(INPUTS))
            if not torch.equal(recognizer(tiny_folder.wave(i)), expected[i])
        ]
    except Exception as error:
        seconds = time.perf_counter() - began
        return [type(error).__name__, str(error), seconds]
    return wrong or "right"


def fork(work: Callable[[], Any]) -> tuple[int, int]:
    """Runs a function in a child: the child, and the end of a pipe with its
    result."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writing, json.dumps(work()).encode())
        # Not os._exit: what it has inherited is destroyed now.
        sys.exit(0)
    os.close(writing)
    return pid, reading


def wait(pid: int, reading: int, deadline: float) -> Any:
    """The result of a child that has ended by itself."""
    while not os.waitpid(pid, os.WNOHANG)[0]:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "hangs"
        time.sleep(0.05)
    with open(reading, "rb") as pipe:
        return json.loads(pipe.read() or b'"died"')


def ask_children(
    recognizers: dict[str, nn.Module],
    answers: dict[str, list[torch.Tensor]],
    count: int,
) -> dict[str, list]:
    """What so many children say, by backend."""
    children = {
        (name, i): fork(
            lambda name=name, i=i: recognize(
                recognizers[name], answers[name], i
            )
        )
        for name in recognizers
        for i in range(count)
    }
    deadline = time.monotonic() + PATIENCE
    said = {key: wait(*child, deadline) for key, child in children.items()}
    return {name: [said[name, i] for i in range(count)] for name in recognizers}


def main(folder: Path, backends: list[str]) -> None:
    """Asks children of this process, which computes with several threads of
    torch, before and after it has used the recognizers."""
    answers = {
        name: torch.load(folder / f"answers-{name}.pt") for name in backends
    }
    recognizers = {
        name: tiny_folder.load(folder / "quantized", name) for name in backends
    }
    torch.set_num_threads(4)
    torch.randn(1000, 1000) @ torch.randn(1000, 1000)
    said = {}
    for state, count in CHILDREN.items():
        if state == "used":
            for recognizer in recognizers.values():
                recognizer(tiny_folder.wave(0))
        said[state] = ask_children(recognizers, answers, count)
    print(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
