"""The search of StableQuant: which units are sensitive, and where to clip them.

Independent of models and data: an :class:`.score.Evaluate` function measures
the recognizer with some layers quantized.
"""
