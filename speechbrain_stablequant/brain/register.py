"""The ``quantize:`` block of a recipe, which needs no change of its script."""

import functools
from typing import Any

import speechbrain as sb

from ..methods.registry import QuantizeConfig
from .attach import StableQuant
from .block import read_block


def register(**block: Any) -> QuantizeConfig:
    """Validate a ``quantize:`` block and attach it to the recipe's Brain.

    Used as ``quantize: !apply:speechbrain_stablequant.register``. Brains that
    are made later with the returned value in their ``hparams`` are attached;
    all others stay as they are.

    Arguments
    ---------
    **block
        Keys of :class:`~speechbrain_stablequant.QuantizeConfig`.

    Returns
    -------
    QuantizeConfig
        The value of the key ``quantize``.

    Raises
    ------
    ConfigError
        Names the first wrong key.

    Example
    -------
    >>> register(weight_bits=6, activation_bits=6).method
    'stablequant'
    """
    _hook_brain_init()
    return read_block(block)


def _hook_brain_init() -> None:
    """Make every new Brain look for a block in its hparams; hooks once."""
    original = sb.Brain.__init__
    if getattr(original, "looks_for_quantize_block", False):
        return

    @functools.wraps(original)
    def init(self, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        # A Brain without hparams has no such attribute.
        hparams = vars(self.hparams) if hasattr(self, "hparams") else {}
        blocks = [v for v in hparams.values() if isinstance(v, QuantizeConfig)]
        if len(blocks) > 1:
            raise ValueError("quantize: the recipe has two quantize blocks")
        if blocks:
            StableQuant(self, blocks[0]).by_block = True

    init.looks_for_quantize_block = True
    sb.Brain.__init__ = init
