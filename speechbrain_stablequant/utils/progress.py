"""Progress bars."""

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(steps: Any, what: str, show: bool, **options: Any) -> tqdm:
    """A bar over ``steps``, or with ``total``; in a file few lines of it."""
    return tqdm(
        steps,
        what,
        dynamic_ncols=True,
        disable=not show,
        mininterval=0.1 if sys.stderr.isatty() else 10,
        **options,
    )
