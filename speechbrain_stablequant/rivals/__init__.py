"""Quantizers of other projects, in the same comparison.

A rival gets the same checkpoint, calibration set and search set, and the same
recipe decodes and scores it. It makes a model of its own kind instead of a
plan, so that there is no inference folder.
"""
