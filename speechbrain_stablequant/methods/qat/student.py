"""The model in quantization-aware training.

The forward pass computes on the quantization grid; the backward pass treats
rounding as the identity and keeps the clamp (straight-through estimator).
Scales are those of the calibration, or are learned (Esser et al., "Learned
step size quantization", 2020). Copies are trained: afterwards the float model
is restored bit for bit.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from ...core.affine import qmax, quantize, weight_scale
from ...core.integer_layer import multiply
from ...core.layer_quant import LayerQuant, LayerTensors
from ...core.plan_tensors import AdjustedTensors
from ...model.layer import Layer
from ...model.products import visible
from ...utils.patching import replaced_item, shadowed_forwards

Quants = dict[str, LayerQuant]


class _Quantize(torch.autograd.Function):
    """Fake quantization with the gradients of :func:`straight_through`."""

    @staticmethod
    def forward(ctx, x, scale, limit, factor):
        ctx.learns, ctx.factor = ctx.needs_input_grad[1], factor
        ctx.shape = scale.shape
        ratio = x * (1.0 / scale)
        rounded = ratio.round() if ctx.learns else ratio.round_()
        grid = rounded.clamp(-limit, limit)
        # Like torch's operators: a value that rounds into the range is inside.
        kept = grid == rounded
        if ctx.learns:
            # Derivative by the scale. At most 1/2 inside the range and at
            # least 1 outside, so that it tells the two apart.
            kept = torch.where(kept, rounded - ratio, grid)
        ctx.save_for_backward(kept)
        return grid.mul_(scale)

    @staticmethod
    def backward(ctx, gradient):
        (kept,) = ctx.saved_tensors
        if not ctx.learns:
            return gradient * kept, None, None, None
        by_scale = (gradient * kept).sum_to_size(ctx.shape) * ctx.factor
        by_input = None
        if ctx.needs_input_grad[0]:
            by_input = gradient * (kept.abs() <= 0.5)
        return by_input, by_scale, None, None


def straight_through(
    x: torch.Tensor, scale: torch.Tensor, bits: int, numbers: int = 0
) -> torch.Tensor:
    """Fake quantization with a straight-through gradient.

    LSQ divides the scale's gradient by ``sqrt(numbers * qmax)``, where
    ``numbers`` values share a scale; 0 leaves it as it is.
    """
    limit = qmax(bits)
    factor = (numbers * limit) ** -0.5 if numbers else 1.0
    return _Quantize.apply(x, scale, limit, factor)


class _TrainedLayer:
    """A layer that computes on the grid, with its own copy of parameters."""

    def __init__(
        self,
        layer: Layer,
        quant: LayerQuant,
        trains: bool,
        learns: bool,
        bfloat16: bool,
    ):
        module = layer.module
        self.module, self.owners, self.quant = module, layer.owners, quant
        self.bfloat16 = bfloat16

        def parameter(value: torch.Tensor, wanted: bool) -> nn.Parameter:
            return nn.Parameter(value.detach().float().clone(), wanted)

        self.weight = parameter(module.weight, trains)
        self.bias = None
        if module.bias is not None:
            self.bias = parameter(module.bias, trains)
        weight_bits, method = quant.weight_bits, quant.weight_method
        self.weight_start = weight_scale(self.weight, weight_bits, method)
        self.input_start = quant.input_scale(self.weight.device)
        # Logarithms of the scales' growth: a step of an optimizer changes
        # large and small scales by the same factor, and none gets negative.
        zeros = map(torch.zeros_like, (self.weight_start, self.input_start))
        self.weight_growth, self.input_growth = (
            parameter(zero, trains and learns) for zero in zeros
        )
        if quant.weight_only:
            self.input_growth.requires_grad_(False)

    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters by attribute name, trained or not."""
        found = vars(self).items()
        return {n: p for n, p in found if isinstance(p, nn.Parameter)}

    def scales(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales of the weight's channels, scale of the input."""
        weight, inputs = self.weight_start, self.input_start
        if self.weight_growth.requires_grad:
            weight = weight * self.weight_growth.exp()
            inputs = inputs * self.input_growth.exp()
        return weight, inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight_scales, input_scale = self.scales()
        quant, weight = self.quant, self.weight
        # In 16 bits the products of grid values would be rounded again.
        with torch.autocast(x.device.type, enabled=False):
            grid = x.float()
            if not quant.weight_only:
                grid = straight_through(
                    grid, input_scale, quant.activation_bits, x[0].numel()
                )
            weight = straight_through(
                weight,
                weight_scales.view(-1, *(1,) * (weight.dim() - 1)),
                quant.weight_bits,
                weight[0].numel(),
            )
        with torch.autocast(x.device.type, torch.bfloat16, self.bfloat16):
            out = multiply(self.module, grid, weight, self.bias)
        return out.to(x.dtype)

    @torch.no_grad()
    def result(self) -> tuple[LayerQuant, LayerTensors]:
        scale, inputs = self.scales()
        bits = self.quant.weight_bits
        tensors = LayerTensors(
            quantize(self.weight, scale, bits),
            scale.clone(),
            None if self.bias is None else self.bias.detach().clone(),
        )
        if not self.input_growth.requires_grad:
            return self.quant, tensors
        amax = float(inputs) * qmax(self.quant.activation_bits)
        return replace(self.quant, activation_amax=amax), tensors


@dataclass
class _Float:
    """A float parameter, its trained copy and the modules that hold it."""

    original: nn.Parameter
    trained: nn.Parameter
    places: list[tuple[nn.Module, str]]


class Student:
    """A model in training: layers with a quant on the grid, all else float."""

    def __init__(
        self,
        layers: Iterable[Layer],
        quants: Mapping[str, LayerQuant],
        modules: Mapping[str, nn.Module],
        learn_scales: bool = False,
        frozen: Callable[[str], bool] = lambda _: False,
        bfloat16: bool = False,
    ):
        self.layers = {
            layer.name: _TrainedLayer(
                layer,
                quants[layer.name],
                not frozen(layer.name),
                learn_scales,
                bfloat16,
            )
            for layer in layers
            if layer.name in quants
        }
        self.floats = self._find_floats(modules, frozen)
        self._replaced = ExitStack()
        self.parameters = {
            f"layers/{name}/{what}": parameter
            for name, layer in self.layers.items()
            for what, parameter in layer.parameters().items()
        } | {f"floats/{name}": f.trained for name, f in self.floats.items()}

    def _find_floats(
        self, modules: Mapping[str, nn.Module], frozen: Callable[[str], bool]
    ) -> dict[str, _Float]:
        taken = {
            id(parameter)
            for layer in self.layers.values()
            for parameter in layer.module.parameters()
        }
        # A parameter at several places is trained once, under its first name.
        found: dict[int, tuple[str, _Float]] = {}
        for key, module in modules.items():
            for path, owner in module.named_modules(prefix=key):
                for attribute, parameter in owner._parameters.items():
                    name, ident = f"{path}.{attribute}", id(parameter)
                    if parameter is None or ident in taken or frozen(name):
                        continue
                    if ident not in found:
                        copy = nn.Parameter(parameter.detach().clone())
                        found[ident] = name, _Float(parameter, copy, [])
                    found[ident][1].places.append((owner, attribute))
        return dict(found.values())

    def trained(self, scales: bool) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name: scales, or all others."""
        return {
            name: parameter
            for name, parameter in self.parameters.items()
            if parameter.requires_grad and name.endswith("_growth") == scales
        }

    def _enter(self) -> None:
        layers = self.layers.values()
        owners = (owner for layer in layers for owner in layer.owners)
        self._replaced.enter_context(visible(owners))
        forwards = {layer.module: layer.forward for layer in layers}
        self._replaced.enter_context(shadowed_forwards(forwards))
        for parameter in self.floats.values():
            for owner, name in parameter.places:
                self._replaced.enter_context(
                    replaced_item(owner._parameters, name, parameter.trained)
                )

    @contextmanager
    def active(self) -> Iterator["Student"]:
        """Context in which the modules compute as the student."""
        with self._replaced:
            self._enter()
            yield self

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Context inside :meth:`active` in which they are the float model."""
        self._replaced.close()
        try:
            yield
        finally:
            self._enter()

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])

    def result(self) -> tuple[Quants, AdjustedTensors]:
        found = {name: layer.result() for name, layer in self.layers.items()}
        floats = {
            name: parameter.trained.detach().float().clone()
            for name, parameter in self.floats.items()
            if not torch.equal(parameter.trained, parameter.original)
        }
        return (
            {name: quant for name, (quant, _) in found.items()},
            AdjustedTensors(
                {name: t for name, (_, t) in found.items()}, floats
            ),
        )
