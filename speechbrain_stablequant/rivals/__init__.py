"""Quantizers from outside, in the same comparison.

A rival gets the same checkpoint, calibration set and search set as the
methods of this package, and is decoded and scored by the same recipe. It makes
a model of its own kind instead of a plan, so it has no inference folder.
"""
