"""Times the triton runtime and its rivals on a CUDA device, in turns.

Example
-------
python tests/benchmarks/gpu.py --model hubert-large --seconds 10 --batch 8
"""

import sys
from collections.abc import Sequence

import harness
import torch
from executors import ours, torch_cuda

EXECUTORS = {**ours.CUDA, **torch_cuda.CUDA}


def require_device(script: str) -> None:
    """Ends the process unless there is a CUDA device."""
    if not torch.cuda.is_available():
        sys.exit(f"{script}: needs a CUDA device, and torch finds none here")


def describe() -> dict[str, str]:
    """What of the card decides its speed."""
    card = torch.cuda.get_device_properties(0)
    return {
        "capability": f"{card.major}.{card.minor}",
        "processors": str(card.multi_processor_count),
        "cuda": str(torch.version.cuda),
    }


def main(argv: Sequence[str] | None = None) -> list[harness.Row]:
    """Runs the benchmark from the command line."""
    harness.parse(EXECUTORS, list(EXECUTORS), "cuda", argv)
    require_device("gpu.py")
    return harness.main(
        EXECUTORS, list(EXECUTORS), "cuda", __file__, describe, argv
    )


if __name__ == "__main__":
    main()
