"""The probe of a folder, once for each tile that the kernels may take.

    python tests/benchmarks/every_tile.py FOLDER

Round k computes every layer with its k-th candidate, so after as many rounds as
the longest list has, each tile has computed real layers end to end.
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch

from speechbrain_stablequant import load
from speechbrain_stablequant.runtimes.triton import build
from speechbrain_stablequant.runtimes.triton.kernels.tuning import Tuner
from speechbrain_stablequant.utils.store import Store


class Forced(Tuner):
    """Takes the k-th candidate of each list."""

    def __init__(self, index: int):
        super().__init__(Store(None), "tiles", "this card")
        self.index, self.longest = index, 0

    def choose(self, key, candidates, run, check=None):
        self.longest = max(self.longest, len(candidates))
        return candidates[self.index % len(candidates)]


def rounds(folder: str, device: str, limit: int, dtype: str) -> list[dict]:
    """A row for each round: whether the probe passed, or why not."""
    rows, longest = [], 1
    while len(rows) < min(longest, limit):
        tuner = Forced(len(rows))
        failure = None
        try:
            with mock.patch.object(build, "make_tuner", return_value=tuner):
                recognizer = load(
                    folder, "triton", device, backend_options={"dtype": dtype}
                )
                # the runtime is made, and the probe computed, by the first call
                recognizer.transcribe_batch(torch.zeros(1, 16000))
        # whatever a compiler or a driver raises: the others go on
        except Exception as error:
            failure = str(error).strip().splitlines()[0]
        longest = max(longest, tuner.longest)
        rows.append({"round": len(rows), "failure": failure})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Ends with status 1 if a tile fails the probe."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument(
        "--dtype", default="auto", help="the interpreter needs float16"
    )
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET"):
        sys.path.append(str(Path(__file__).resolve().parents[1]))
        importlib.import_module("triton_interpreter")
    torch.manual_seed(0)
    rows = rounds(options.folder, options.device, options.rounds, options.dtype)
    sys.exit(any(row["failure"] for row in rows))


if __name__ == "__main__":
    main()
