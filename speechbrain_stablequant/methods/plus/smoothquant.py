"""Equalization: factors move from activations to weights.

Xiao et al., "SmoothQuant" (2023). A few channels of an activation are far
larger than the rest and set its scale. Where a channel can be divided by a
factor before it is quantized, and the weights that multiply it be multiplied
by the same factor, the float model computes what it did and the activation is
easier to quantize. Between a normalization and the linears that alone read
its output, the normalization's own gain and bias take the factor; between
value and output projection the value's weights do, since attention is linear
in them. Not in models that normalize after each sublayer: there the residual
reads the normalization as well.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from ...model.layers import Encoder, Layer
from ...utils.distributed import gathered_tensors

# Factors beyond this would only move rounding noise about.
_MAX_FACTOR = 1e4


@dataclass(frozen=True)
class Site:
    """A place where factors can move.

    Arguments
    ---------
    name : str
        Path of the producer.
    producer : torch.nn.Module
        The normalization or Linear whose output channels are divided.
    consumers : tuple of Layer
        The linears that read it, and nothing else does.
    """

    name: str
    producer: nn.Module = field(repr=False)
    consumers: tuple[Layer, ...]


def find_sites(
    encoders: Iterable[Encoder], layers: Iterable[Layer]
) -> list[Site]:
    """Finds all places in wav2vec 2.0 and HuBERT encoders.

    Arguments
    ---------
    encoders : iterable of Encoder
        The encoders.
    layers : iterable of Layer
        Layers that are quantized. A site with another consumer is left out.

    Returns
    -------
    list of Site
        In network order.
    """
    by_id = {id(layer.module): layer for layer in layers}
    sites = []
    for encoder in encoders:
        names = {
            id(module): name
            for name, module in encoder.model.named_modules(prefix=encoder.path)
        }
        for producer, consumers in _places(encoder.model):
            found = tuple(by_id.get(id(module)) for module in consumers)
            if producer is not None and None not in found:
                sites.append(Site(names[id(producer)], producer, found))
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
        attention, forward = block.attention, block.feed_forward
        heads = (attention.q_proj, attention.k_proj, attention.v_proj)
        if model.config.do_stable_layer_norm:
            yield block.layer_norm, heads
        yield attention.v_proj, (attention.out_proj,)
        if model.config.do_stable_layer_norm:
            yield block.final_layer_norm, (forward.intermediate_dense,)


class ChannelMaxima:
    """Largest |input| of each channel of linears.

    Arguments
    ---------
    layers : iterable of Layer
        Linears to watch.

    Example
    -------
    >>> linear = nn.Linear(2, 1)
    >>> maxima = ChannelMaxima([Layer("a", linear, "linear", "head")])
    >>> with maxima.watch():
    ...     _ = linear(torch.tensor([[1.0, -3.0], [-2.0, 0.0]]))
    >>> maxima.values["a"]
    tensor([2., 3.])
    """

    def __init__(self, layers: Iterable[Layer]):
        self.layers = list(layers)
        self.values: dict[str, torch.Tensor] = {}

    @contextmanager
    def watch(self) -> Iterator["ChannelMaxima"]:
        """Context in which forward passes are seen."""
        handles = [
            layer.module.register_forward_pre_hook(self._hook(layer.name))
            for layer in self.layers
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def join(self) -> None:
        """Takes up what other processes have seen."""
        for name, value in self.values.items():
            self.values[name] = torch.stack(gathered_tensors(value)).amax(0)

    def _hook(self, name: str):
        def hook(module: nn.Module, args: tuple) -> None:
            x = args[0].detach().float().abs()
            found = x.reshape(-1, x.shape[-1]).amax(0)
            if name in self.values:
                found = torch.maximum(found, self.values[name])
            self.values[name] = found

        return hook


def factors(site: Site, maxima: torch.Tensor, strength: float) -> torch.Tensor:
    """What each channel of a site is divided by.

    Arguments
    ---------
    site : Site
        The place.
    maxima : torch.Tensor
        Largest |activation| of each channel.
    strength : float
        0: none; 1: all channels equally large afterwards.

    Returns
    -------
    torch.Tensor
        float32 [channels], positive.

    Example
    -------
    >>> linear = nn.Linear(2, 1)
    >>> _ = linear.weight.data.fill_(1.0)
    >>> site = Site("n", nn.LayerNorm(2), (Layer("a", linear, "linear", "u"),))
    >>> factors(site, torch.tensor([1.0, 16.0]), 0.5)
    tensor([1., 4.])
    """
    weights = torch.stack(
        [c.module.weight.detach().float().abs().amax(0) for c in site.consumers]
    ).amax(0)
    if strength == 0:
        return torch.ones_like(weights)
    high = maxima.to(weights.device)
    # Channels that never speak, and inputs that nobody reads.
    high = high.clamp(min=1e-5 * float(high.max()) + 1e-30)
    weights = weights.clamp(min=1e-5 * float(weights.max()) + 1e-30)
    found = high**strength / weights ** (1 - strength)
    return found.clamp(1 / _MAX_FACTOR, _MAX_FACTOR)


@contextmanager
def equalized(
    sites: Sequence[Site], by_site: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    """Context in which the float model is equalized.

    Arguments
    ---------
    sites : sequence of Site
        All places.
    by_site : Mapping
        Factors by the name of the site.
    """
    changed: dict[int, nn.Parameter] = {}
    for site in sites:
        modules = [site.producer, *(c.module for c in site.consumers)]
        for module in modules:
            for parameter in (module.weight, module.bias):
                if parameter is not None:
                    changed[id(parameter)] = parameter
    kept = {key: p.detach().clone() for key, p in changed.items()}
    try:
        with torch.no_grad():
            for site in sites:
                factor = by_site[site.name].to(site.producer.weight.device)
                _divide(site.producer, factor)
                for consumer in site.consumers:
                    consumer.module.weight.mul_(factor)
        yield
    finally:
        with torch.no_grad():
            for key, parameter in changed.items():
                parameter.copy_(kept[key])


def _divide(producer: nn.Module, factor: torch.Tensor) -> None:
    if producer.bias is not None:
        producer.bias.div_(factor)
    is_linear = isinstance(producer, nn.Linear)
    producer.weight.div_(factor[:, None] if is_linear else factor)


def changed_floats(
    sites: Iterable[Site], quantized: Iterable[str]
) -> dict[str, torch.Tensor]:
    """The parameters that :func:`equalized` changes and integers do not hold.

    Arguments
    ---------
    sites : iterable of Site
        All places; called inside of the context.
    quantized : iterable of str
        Names of quantized layers: their weights are integers.

    Returns
    -------
    dict
        Copies by the parameter's name in the state dict.
    """
    quantized = set(quantized)
    found = {}
    for site in sites:
        modules = {site.name: site.producer}
        modules.update({c.name: c.module for c in site.consumers})
        for name, module in modules.items():
            if name not in quantized:
                found[f"{name}.weight"] = module.weight.detach().clone()
            if name == site.name and module.bias is not None:
                found[f"{name}.bias"] = module.bias.detach().clone()
    return found
