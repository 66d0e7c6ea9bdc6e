"""What a runtime is, and how it replaces the forward of a float model.

A runtime executes an encoder from its description. ``forward`` is replaced on
the instance of the HuggingFace model, by ``utils.patching.shadowed_forwards``:
the Brain, its wrapper and its checkpoints are unchanged. Layers outside the
encoder (heads) are replaced one by one.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ..model import products
from ..utils.precision import plain_float32


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


class EncoderOutput(NamedTuple):
    """transformers' ``BaseModelOutput`` by name, without importing it."""

    last_hidden_state: torch.Tensor
    hidden_states: None = None
    attentions: None = None


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


def encoder_forward(execute: EncoderExecutor) -> Callable[..., Any]:
    """A HuggingFace model's forward that runs an executor."""

    def forward(
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        **kwargs: Any,
    ) -> EncoderOutput:
        if output_hidden_states or kwargs.get("output_attentions"):
            raise ValueError(
                "an integer runtime gives the last hidden state only; use "
                "backend: torch for output_all_hiddens"
            )
        lengths = None
        if attention_mask is not None:
            lengths = attention_mask.long().sum(1)
        return EncoderOutput(execute(input_values, lengths))

    return forward


def modules_by_name(
    modules: Mapping[str, nn.Module], names: Collection[str]
) -> dict[str, nn.Module]:
    """Module by layer name; ValueError for a layer that is not in the model."""
    found = products.modules_by_name(modules)
    for name in names:
        if name not in found:
            raise ValueError(
                f"layer '{name}' of the plan is not in the model; use the "
                "plan of this model"
            )
    return {name: found[name] for name in names}


def layer_forwards(
    modules: Mapping[str, nn.Module], forwards: Mapping[str, Callable[..., Any]]
) -> dict[nn.Module, Callable[..., Any]]:
    """Forwards by module of layers and of owners that make them visible."""
    layers = modules_by_name(modules, forwards)
    by_name = products.modules_by_name(modules)
    owners = [x for name in forwards for x in products.owners_of(name, by_name)]
    return {
        **products.visible_forwards(owners),
        **{layers[name]: forward for name, forward in forwards.items()},
    }


def in_own_precision(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a forward so that the recipe's autocast does not affect it."""

    def plain(*args: Any, **kwargs: Any) -> Any:
        x = next(
            x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)
        )
        # Entering the context takes as long as a small product.
        if not x.is_cuda and not torch.is_autocast_enabled(x.device.type):
            return forward(*args, **kwargs)
        with plain_float32(x):
            return forward(*args, **kwargs)

    return plain
