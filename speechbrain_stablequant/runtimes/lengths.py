"""Lengths that inputs are padded to, so that few shapes are computed."""


def round_frames(frames: int, unit: int = 8, steps: int = 8) -> int:
    """Rounds a number of frames up to one of a few.

    These are the multiples of ``unit`` up to ``2 * unit * steps``; from there
    on there are ``steps`` of them before each doubling.

    Arguments
    ---------
    frames : int
        At least 1.
    unit : int
        The smallest step.
    steps : int
        Steps before each doubling: at most one part in so many is added, or
        ``unit - 1``.

    Returns
    -------
    int

    Example
    -------
    >>> [round_frames(n) for n in (1, 63, 65, 499, 513)]
    [8, 64, 72, 512, 576]
    """
    step = unit
    while step * steps * 2 < frames:
        step *= 2
    return -(-frames // step) * step
