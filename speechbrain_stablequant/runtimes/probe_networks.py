"""Networks that a probe compares: an encoder alone, or with its heads."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..core.integer_layer import IntegerLayer, integer_layer
from ..core.layer_quant import LayerQuant
from ..model.layers import Encoder, Layer
from ..utils.patching import hooked, shadowed
from ..utils.precision import plain_float32
from .base import shadowed_forwards
from .cpu import narrowed
from .probe_input import float_waves, utterances

#: From float32 [batch, samples] and relative lengths [batch] to the encoder's
#: last hidden state [batch, frames, channels] and the heads' output [batch,
#: frames, labels], or None without heads.
Compute = Callable[
    [torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]
]

#: The plan's integers, and those with 7-bit weights of a CPU without VNNI.
OWN, SEVEN_BITS = "own", "seven"

#: Range of an input that is all zeros.
_LEAST_RANGE = 1e-6


def run_network(
    compute: Compute,
    wavs: torch.Tensor,
    lengths: torch.Tensor,
    device: str | torch.device,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A network's outputs, float32 on the CPU; without gradients, in float32
    whatever precision the recipe uses, the random state preserved."""
    wavs = wavs.to(device)
    relative = (lengths / wavs.shape[1]).to(device)
    cuda = [wavs.device] if wavs.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(cuda), plain_float32(wavs):
        hidden, labels = compute(wavs, relative)
        return (
            hidden.float().cpu(),
            None if labels is None else labels.float().cpu(),
        )


@contextmanager
def evaluating(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Context with modules in evaluation mode."""
    with ExitStack() as stack:
        for module in modules.values():
            for part in module.modules():
                stack.enter_context(shadowed(part, "training", False))
        yield


def chain(
    parts: Mapping[str, nn.Module],
    use_lengths: bool,
    forwards: Mapping[nn.Module, Callable[..., Any]],
) -> Compute:
    """A runtime's computation of an encoder's wrapper (its ``model`` is the
    encoder) and the heads after it."""
    wrapper, *heads = parts.values()

    def compute(
        wavs: torch.Tensor, relative: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kept = []
        handle = wrapper.model.register_forward_hook(
            lambda module, args, output: kept.append(output.last_hidden_state)
        )
        try:
            with shadowed_forwards(forwards):
                x = wrapper(wavs, relative if use_lengths else None)
                for head in heads:
                    x = head(x)
        finally:
            handle.remove()
        return kept[-1], x

    return compute


def encoder_alone(
    model: nn.Module, forwards: Mapping[nn.Module, Callable[..., Any]]
) -> Compute:
    """A runtime's computation of an encoder without its wrapper."""

    def compute(
        wavs: torch.Tensor, relative: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        samples = wavs.shape[1]
        real = (relative * samples).round()
        place = torch.arange(samples, device=wavs.device)
        mask = (place < real[:, None]).long()
        wavs = F.layer_norm(wavs, wavs.shape[1:])
        with shadowed_forwards(forwards):
            return model(wavs, attention_mask=mask).last_hidden_state, None

    return compute


def quick_integers(
    encoder: Encoder,
    layers: Iterable[Layer],
    bits: tuple[int, int],
    rate: int,
    device: str | torch.device,
) -> dict[str, IntegerLayer]:
    """Integers of an encoder, calibrated on a probe's utterances: enough to
    try a runtime before there is a plan. ``bits``: of weights and
    activations."""
    inside = [x for x in layers if x.name.startswith(f"{encoder.path}.")]
    ranges: dict[str, float] = {}

    def observe(name: str, module: nn.Module, args: tuple) -> None:
        found = float(args[0].abs().max())
        ranges[name] = max(ranges.get(name, _LEAST_RANGE), found)

    wave, lengths = utterances(rate)
    alone = encoder_alone(encoder.model, {})
    with hooked((x.module, partial(observe, x.name)) for x in inside):
        run_network(alone, float_waves(wave), lengths, device)
    return {
        x.name: integer_layer(x, LayerQuant(*bits, ranges[x.name])).to("cpu")
        for x in inside
        if x.name in ranges
    }


def weight_forms(
    integers: Mapping[str, IntegerLayer],
) -> dict[str, dict[str, IntegerLayer]]:
    """The integers that runtimes may execute, by form and layer name;
    ``SEVEN_BITS`` only where it differs from ``OWN``."""
    seven = {name: narrowed(layer) for name, layer in integers.items()}
    forms = {OWN: dict(integers)}
    if any(seven[name] is not layer for name, layer in integers.items()):
        forms[SEVEN_BITS] = seven
    return forms
