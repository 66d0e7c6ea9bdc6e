"""The recipe without mention, as one of several processes.

> torchrun --nproc_per_node 2 distributed_recipe.py hparams.yaml ARGUMENTS
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    recipe = Path(__file__).resolve().parent / "recipe_without_mention"
    sys.path.insert(0, str(recipe))
    import speechbrain as sb
    import train

    from speechbrain_stablequant import brain

    # The sets of the tests have a few batches only.
    brain._TOGETHER = 1
    _, run_opts, _ = sb.parse_arguments(sys.argv[1:])
    sb.utils.distributed.ddp_init_group(run_opts)
    train.run(*train.prepare(sys.argv[1:]))
