"""Times the triton runtime and its rivals on a CUDA device, in turns.

Example
-------
python tests/benchmarks/gpu.py --model hubert-large --seconds 10 --batch 8
"""

from collections.abc import Sequence

import harness
import torch
from executors import ours, tensorrt_, torch_cuda

EXECUTORS = {**ours.CUDA, **torch_cuda.CUDA, **tensorrt_.CUDA}


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
    return harness.main(EXECUTORS, "cuda", __file__, describe, argv)


if __name__ == "__main__":
    main()
