"""Buckets of input lengths, and a cache of what is made for each."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from ...core.encoder_spec import EncoderSpec
from ..lengths import round_frames


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


class LeastRecent:
    """LRU cache that discards an item before it makes the next one."""

    def __init__(self, limit: int, discard: Callable[[Any], None]):
        self.limit = limit
        self.discard = discard
        self.items: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[Any], Any]) -> Any:
        """The item of a key, made if it is missing."""
        if key in self.items:
            self.items.move_to_end(key)
            return self.items[key]
        while len(self.items) >= self.limit:
            # not in a variable: its memory is free before the next one's
            self.discard(self.items.popitem(last=False)[1])
        self.items[key] = make(key)
        return self.items[key]
