"""What a runtime is.

It executes an encoder from its description; layers outside the encoder (heads)
are executed one by one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch


class EncoderExecutor(Protocol):
    """Executes one encoder."""

    def __call__(
        self, wavs: torch.Tensor, lengths: torch.Tensor | None
    ) -> torch.Tensor:
        """Encode float32 [batch, samples], normalized as the model wants it, to
        float32 [batch, frames, channels]; padded frames hold anything finite.
        ``lengths``: int64 [batch], real samples of each utterance, or None if
        the model is to see no mask."""


#: Executes one Linear or Conv1d: float input, float32 output.
LayerExecutor = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class NoOptions:
    """``backend_options`` of a runtime that has none."""


@dataclass(frozen=True)
class Runtime:
    """What the registry knows of a runtime.

    Functions and classes are named as ``"module:name"``, relative to this
    package, and imported on first use: optional packages are not needed before.
    """

    #: A dataclass of its ``backend_options``.
    options: type = NoOptions
    #: Makes an EncoderExecutor of an EncoderSpec and options; None: layer by
    #: layer.
    encoder: str | None = None
    #: Makes a LayerExecutor of an IntegerLayer outside of an encoder.
    layer: str = "torch_int8.head_layer:make_layer"
    #: Makes a LayerRunner of the options, which computes single layers for the
    #: comparison with exact arithmetic. None if ``why_not`` compares them, or
    #: if no check is needed.
    layer_runner: str | None = None
    #: Function that tells why it cannot run on a torch.device, or None if it
    #: can.
    why_not: str | None = None
    #: Type of the device that it runs on; None for any. Runtimes for "cpu"
    #: execute 7 bits on CPUs without VNNI, where sums of two products saturate.
    device: str | None = None
    #: Whether it imitates integers in floating point: no claim of speed.
    simulates: bool = False
    #: Python packages that it needs, and what to install for them.
    needs: tuple[str, ...] = ()
    install: str = ""
    #: Whether it takes in layers whose weights are still in their file, and
    #: reads one after the other.
    streams: bool = False
    #: Function that makes the forward of a captured part, see
    #: ``captured.executor.part_forward``; None if it executes no parts.
    part: str | None = None
    #: Whether what was built in a process also computes in its forked
    #: children; otherwise a child builds its own.
    fork_safe: bool = False


def require_frame(frames: int, samples: int) -> None:
    """Raise ValueError if an input is too short for one frame."""
    if frames < 1:
        raise ValueError(
            f"an input of {samples} samples is too short for the model; "
            "leave out utterances below 0.03 s"
        )


def round_frames(frames: int, unit: int = 8, steps: int = 8) -> int:
    """Round a length up, so that few shapes are computed: to a multiple of
    ``unit``; from ``2 * unit * steps`` on, to one of ``steps`` evenly spaced
    lengths between one doubling and the next."""
    step = unit
    while step * steps * 2 < frames:
        step *= 2
    return -(-frames // step) * step
