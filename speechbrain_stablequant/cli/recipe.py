"""Runs a recipe's script as ``python SCRIPT ARGUMENTS`` does, but that a wrong
``quantize:`` block is one line; its traceback goes into the recipe's log.

Executed by its path, so that the script finds modules where it always does.
"""

import logging
import runpy
import sys
from pathlib import Path

_PACKAGE = "speechbrain_stablequant"


def run(script: str) -> None:
    """Run a script whose arguments are in ``sys.argv``."""
    try:
        runpy.run_path(script, run_name="__main__")
    except ValueError as error:
        # If it is not loaded, the error is not of it.
        config = sys.modules.get(f"{_PACKAGE}.config")
        if config is None or not isinstance(error, config.ConfigError):
            raise
        logging.getLogger(_PACKAGE).debug("the block is wrong", exc_info=True)
        print(f"stablequant: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    del sys.argv[0]
    # From Python 3.11; with it, the script's folder is not searched.
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    # As Python's own ``__file__``, for a script that changes the folder.
    run(str(Path(sys.argv[0]).absolute()))
