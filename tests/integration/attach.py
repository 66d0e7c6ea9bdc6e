"""The recipe without mention, with a line of Python instead of a block.

> python attach.py BLOCK hparams.yaml ARGUMENTS

With SECONDS_A_BATCH each batch waits, so that a signal meets a search.
"""

import json
import os
import sys
import time
from pathlib import Path

from speechbrain_stablequant import StableQuant

if __name__ == "__main__":
    recipe = Path(__file__).resolve().parent / "recipe_without_mention"
    sys.path.insert(0, str(recipe))
    from train import prepare, run

    brain, sets, hparams = prepare(sys.argv[2:])
    pause = float(os.environ.get("SECONDS_A_BATCH", "0"))
    if pause:
        quick = brain.compute_forward

        def compute_forward(batch, stage):
            """Sleeps first."""
            time.sleep(pause)
            return quick(batch, stage)

        brain.compute_forward = compute_forward
    StableQuant.attach(brain, **json.loads(sys.argv[1]))
    run(brain, sets, hparams)
