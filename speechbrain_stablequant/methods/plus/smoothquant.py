"""Equalization: scale migrates from activations to weights.

Xiao et al., "SmoothQuant" (2023). A few channels with large activations set
the scale of all. Dividing a channel by a factor before quantization, and
multiplying the weights that read it, leaves the float model as it is. The
producer takes the factor: a normalization's gain and bias, or the value
projection, in which attention is linear. A post-norm model's residual reads
the normalization as well, so its sites are fewer.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from ...model.layers import Encoder, Layer, visible_layers
from ...utils.distributed import gathered_tensors
from ...utils.patching import hooked, restored_values
from ..session.protocols import Recognizer

_MAX_FACTOR = 1e4  # larger factors only move rounding noise


@dataclass(frozen=True)
class Site:
    """A place where scale can migrate.

    ``producer``: the normalization or Linear whose output channels are divided;
    ``consumers``: the linears that are its only readers.
    """

    name: str
    producer: nn.Module = field(repr=False)
    consumers: tuple[Layer, ...]


def find_sites(
    encoders: Iterable[Encoder], layers: Iterable[Layer]
) -> list[Site]:
    """Sites whose consumers are all among ``layers``, in network order."""
    by_module = {layer.module: layer for layer in layers}
    sites = []
    for encoder in encoders:
        named = encoder.model.named_modules(prefix=encoder.path)
        names = {module: name for name, module in named}
        for producer, consumers in _places(encoder.model):
            found = tuple(by_module.get(module) for module in consumers)
            if producer is not None and None not in found:
                sites.append(Site(names[producer], producer, found))
    return sites


def _places(
    model: nn.Module,
) -> Iterator[tuple[nn.Module | None, tuple[nn.Module, ...]]]:
    projection = model.feature_projection
    # HuBERT may have none. wav2vec 2.0 also returns the normalized features,
    # but recognizers do not read them.
    norm = getattr(projection, "layer_norm", None)
    yield norm, (projection.projection,)
    for block in model.encoder.layers:
        if not hasattr(block, "attention"):
            continue  # a Conformer's
        attention, forward = block.attention, block.feed_forward
        heads = (attention.q_proj, attention.k_proj, attention.v_proj)
        # WavLM's gate also reads the normalized input.
        gated = hasattr(attention, "gru_rel_pos_linear")
        if model.config.do_stable_layer_norm and not gated:
            yield block.layer_norm, heads
        yield attention.v_proj, (attention.out_proj,)
        if model.config.do_stable_layer_norm:
            yield block.final_layer_norm, (forward.intermediate_dense,)


def channel_maxima(
    sites: Iterable[Site], recognizer: Recognizer
) -> dict[Site, torch.Tensor]:
    """Largest |activation| of each channel at each site, in calibration."""
    found: dict[Site, torch.Tensor] = {}

    def note(site: Site, module: nn.Module, args: tuple) -> None:
        x = args[0].detach().float().abs()
        largest = x.reshape(-1, x.shape[-1]).amax(0)
        found[site] = torch.maximum(largest, found.get(site, largest))

    sites = list(sites)
    firsts = [site.consumers[0] for site in sites]
    hooks = ((s.consumers[0].module, partial(note, s)) for s in sites)
    with visible_layers(firsts), hooked(hooks):
        recognizer.forward("calibration", lambda _: None)
    return {
        site: torch.stack(gathered_tensors(value)).amax(0)
        for site, value in found.items()
    }


def factors(site: Site, maxima: torch.Tensor, strength: float) -> torch.Tensor:
    """Divisors [channels]; strength 1 makes activations equally large."""
    weights = torch.stack(
        [c.module.weight.detach().float().abs().amax(0) for c in site.consumers]
    ).amax(0)
    high = maxima.to(weights.device)
    # Channels without activations or without weights.
    high = high.clamp(min=1e-5 * float(high.max()) + 1e-30)
    weights = weights.clamp(min=1e-5 * float(weights.max()) + 1e-30)
    found = high**strength / weights ** (1 - strength)
    return found.clamp(1 / _MAX_FACTOR, _MAX_FACTOR)


@contextmanager
def equalized(by_site: Mapping[Site, torch.Tensor]) -> Iterator[None]:
    parameters = [
        parameter
        for site in by_site
        for module in (site.producer, *(c.module for c in site.consumers))
        for parameter in (module.weight, module.bias)
        if parameter is not None
    ]
    with restored_values(parameters):
        with torch.no_grad():
            for site, factor in by_site.items():
                producer = site.producer
                factor = factor.to(producer.weight.device)
                if producer.bias is not None:
                    producer.bias.div_(factor)
                is_linear = isinstance(producer, nn.Linear)
                producer.weight.div_(factor[:, None] if is_linear else factor)
                for consumer in site.consumers:
                    consumer.module.weight.mul_(factor)
        yield


def equalized_parameters(sites: Iterable[Site]) -> dict[str, torch.Tensor]:
    """What :func:`equalized` changes, by name in the state dict."""
    changed = {}
    for site in sites:
        changed[f"{site.name}.weight"] = site.producer.weight
        for layer in site.consumers:
            changed[f"{layer.name}.weight"] = layer.module.weight
        if site.producer.bias is not None:
            changed[f"{site.name}.bias"] = site.producer.bias
    return changed
