"""Upstream's recipes with our block: corpora, models and the rows of
``upstream.py``."""
