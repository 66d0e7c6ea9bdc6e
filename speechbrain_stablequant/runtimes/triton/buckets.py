"""Lengths that share a shape, and what is kept for each shape."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from ...model.encoder_spec import EncoderSpec
from ..lengths import round_frames

Kept = TypeVar("Kept")


def samples_for(spec: EncoderSpec, frames: int) -> int:
    """Fewest samples that give so many frames.

    Arguments
    ---------
    spec : EncoderSpec
        The encoder.
    frames : int
        At least 1.

    Returns
    -------
    int
    """
    for stage in reversed(spec.convs):
        kernel = stage.conv.weight.shape[-1]
        frames = (frames - 1) * stage.conv.stride + kernel
    return frames


def bucket_samples(spec: EncoderSpec, samples: int) -> int:
    """Length that an input of so many samples is padded to.

    Arguments
    ---------
    spec : EncoderSpec
        The encoder.
    samples : int
        Enough for a frame.

    Returns
    -------
    int
        At least ``samples``, with a round number of frames: at most 12.5 %
        more than needed, or 7.
    """
    # the samples behind the last frame may reach into one more
    frames = round_frames(spec.frames(samples))
    while samples_for(spec, frames) < samples:
        frames = round_frames(frames + 1)
    return samples_for(spec, frames)


class LeastRecent(Generic[Kept]):
    """Keeps what was used last, and lets go of what was not.

    Arguments
    ---------
    limit : int
        How many to keep, at least 1.
    discard : callable, optional
        Called with what is let go, before its successor is made.

    Example
    -------
    >>> kept = LeastRecent(2)
    >>> [kept.get(key, str) for key in (1, 2, 1, 3)]
    ['1', '2', '1', '3']
    >>> list(kept.items)
    [1, 3]
    """

    def __init__(
        self, limit: int, discard: Callable[[Kept], None] | None = None
    ):
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self.limit = limit
        self.discard = discard
        self.items: OrderedDict[Hashable, Kept] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[Hashable], Kept]) -> Kept:
        """What is kept under a key, made if it is not there."""
        if key in self.items:
            self.items.move_to_end(key)
            return self.items[key]
        while len(self.items) >= self.limit:
            _, old = self.items.popitem(last=False)
            if self.discard is not None:
                self.discard(old)
            # its memory must be free before the successor takes some
            del old
        self.items[key] = make(key)
        return self.items[key]
