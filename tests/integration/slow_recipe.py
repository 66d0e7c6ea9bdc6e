"""The recipe without mention, slower: so that a kill meets its search.

> SECONDS_A_BATCH=0.01 python slow_recipe.py hparams.yaml ARGUMENTS
"""

import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    recipe = Path(__file__).resolve().parent / "recipe_without_mention"
    sys.path.insert(0, str(recipe))
    import train

    pause = float(os.environ["SECONDS_A_BATCH"])
    quick = train.Recognizer.compute_forward

    def compute_forward(self, batch, stage):
        """Sleeps first."""
        time.sleep(pause)
        return quick(self, batch, stage)

    train.Recognizer.compute_forward = compute_forward
    train.run(*train.prepare(sys.argv[1:]))
