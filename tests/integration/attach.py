"""The recipe without mention, with a line of Python instead of a block.

> python attach.py BLOCK hparams.yaml ARGUMENTS
"""

import json
import sys
from pathlib import Path

from speechbrain_stablequant import StableQuant

if __name__ == "__main__":
    recipe = Path(__file__).resolve().parent / "recipe_without_mention"
    sys.path.insert(0, str(recipe))
    from train import prepare, run

    brain, sets, hparams = prepare(sys.argv[2:])
    StableQuant.attach(brain, **json.loads(sys.argv[1]))
    run(brain, sets, hparams)
