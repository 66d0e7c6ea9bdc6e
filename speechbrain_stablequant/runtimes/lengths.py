"""Lengths that inputs are padded to, so that few shapes are computed."""


def round_frames(frames: int, unit: int = 8, steps: int = 8) -> int:
    """Round up to a multiple of ``unit`` or, from ``2 * unit * steps`` on,
    to one of ``steps`` lengths before each doubling."""
    step = unit
    while step * steps * 2 < frames:
        step *= 2
    return -(-frames // step) * step
