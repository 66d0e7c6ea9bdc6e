"""The recipe without mention, as one of several processes.

> torchrun --nproc_per_node 2 distributed_recipe.py hparams.yaml ARGUMENTS

With KILLED_AT=5 in its environment a process kills itself when it is about to
ask the others for the fifth time what they have measured.
"""

import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    recipe = Path(__file__).resolve().parent / "recipe_without_mention"
    sys.path.insert(0, str(recipe))
    import speechbrain as sb
    import train

    from speechbrain_stablequant.brain import recognizer as brain

    # The sets of the tests have a few batches only.
    brain._TOGETHER = 1

    asks = brain.gathered
    left = int(os.environ.get("KILLED_AT", "0"))

    def gathered(value):
        """Asks, or ends as if the machine had run out of memory."""
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return asks(value)

    brain.gathered = gathered
    _, run_opts, _ = sb.parse_arguments(sys.argv[1:])
    sb.utils.distributed.ddp_init_group(run_opts)
    train.run(*train.prepare(sys.argv[1:]))
