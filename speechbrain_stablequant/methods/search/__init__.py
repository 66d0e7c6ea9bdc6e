"""The search of StableQuant: which units are sensitive, and where to clip them.

Independent of models and data: an :class:`.score.Evaluate` function measures
the recognizer with some layers quantized.
"""

from dataclasses import fields

from ...config import SearchConfig

#: What a method that searches reads of ``search``, beside the limit of the
#: float model's WER, which holds for every method.
SEARCH_KEYS = tuple(
    f"search.{row.name}"
    for row in fields(SearchConfig)
    if row.name != "max_float_wer"
)
