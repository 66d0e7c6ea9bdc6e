"""The recipe without mention on a machine whose OpenVINO is wrong: it takes
the scales of one layer twice.

> python faulty_recipe.py hparams.yaml ARGUMENTS
"""

import sys
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    recipe = Path(__file__).resolve().parent / "recipe_without_mention"
    sys.path.insert(0, str(recipe))
    import train

    from speechbrain_stablequant.runtimes.openvino_ import executor

    make_executor = executor.OpenVINOExecutor

    def make_wrong(spec, **options):
        """The executor of another encoder."""
        block = spec.blocks[0]
        down = replace(block.down, weight_scale=2 * block.down.weight_scale)
        blocks = (replace(block, down=down), *spec.blocks[1:])
        return make_executor(replace(spec, blocks=blocks), **options)

    executor.OpenVINOExecutor = make_wrong
    train.run(*train.prepare(sys.argv[1:]))
