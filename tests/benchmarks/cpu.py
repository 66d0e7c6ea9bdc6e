"""Times this project's CPU runtimes and their rivals, in turns.

Example
-------
python tests/benchmarks/cpu.py --model hubert-large --seconds 10 --batch 1
"""

from collections.abc import Sequence

import harness
from executors import openvino_, ort, ours, torch_

from speechbrain_stablequant.runtimes.cpu import cpu_class

EXECUTORS = {**ours.CPU, **torch_.CPU, **ort.CPU, **openvino_.CPU}


def describe() -> dict[str, str]:
    """What of the CPU decides the speed of integers."""
    found = cpu_class()
    return {"cpu_class": found.name, "bf16": str(found.bf16)}


def main(argv: Sequence[str] | None = None) -> list[harness.Row]:
    """Runs the benchmark from the command line."""
    return harness.main(EXECUTORS, "cpu", __file__, describe, argv)


if __name__ == "__main__":
    main()
