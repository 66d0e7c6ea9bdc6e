"""Buckets of input lengths, and a cache of what is made for each."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from ...core.encoder_spec import EncoderSpec
from ..lengths import round_frames

Kept = TypeVar("Kept")


def samples_for(spec: EncoderSpec, frames: int) -> int:
    """Smallest number of samples that gives ``frames`` frames."""
    for stage in reversed(spec.convs):
        kernel = stage.conv.weight.shape[-1]
        frames = (frames - 1) * stage.conv.stride + kernel
    return frames


def bucket_samples(spec: EncoderSpec, samples: int) -> int:
    """Length to pad to: at most 12.5 % or 7 frames more than needed."""
    # samples behind the last frame may need one more frame
    frames = round_frames(spec.frames(samples))
    while samples_for(spec, frames) < samples:
        frames = round_frames(frames + 1)
    return samples_for(spec, frames)


class LeastRecent(Generic[Kept]):
    """LRU cache that discards an item before it makes the next one."""

    def __init__(
        self, limit: int, discard: Callable[[Kept], None] | None = None
    ):
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self.limit = limit
        self.discard = discard
        self.items: OrderedDict[Hashable, Kept] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[Hashable], Kept]) -> Kept:
        """The item of a key, made if it is missing."""
        if key in self.items:
            self.items.move_to_end(key)
            return self.items[key]
        while len(self.items) >= self.limit:
            _, old = self.items.popitem(last=False)
            if self.discard is not None:
                self.discard(old)
            # free its memory before the next one allocates
            del old
        self.items[key] = make(key)
        return self.items[key]
