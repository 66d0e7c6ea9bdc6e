"""The search of StableQuant: which units suffer, and where to cut them.

Nothing here knows models or data: an :class:`Evaluate` function says how well
the recognizer does when some layers are quantized.
"""

from ..plus.layer_clipping import search_layers
from .divergence import Divergence
from .journal import Journal
from .paired import Selection
from .percentile import search_cutoffs
from .score import Evaluate, Score, check_float_wer
from .sensitivity import select_units

__all__ = [
    "Divergence",
    "Evaluate",
    "Journal",
    "Score",
    "Selection",
    "check_float_wer",
    "search_cutoffs",
    "search_layers",
    "select_units",
]
