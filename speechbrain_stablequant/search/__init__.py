"""The search of StableQuant: which units suffer, and where to cut them.

Nothing here knows models or data: an :class:`Evaluate` function says how well
the recogniser does when some layers are quantized.
"""

from .cutoff import search_cutoffs
from .divergence import Divergence
from .journal import Journal
from .layerwise import search_layers
from .paired import Selection
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
