"""Decides integers and biases of all layers, one after the other."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ...core.plan import LayerQuant
from ...core.plan_tensors import LayerTensors
from ...core.weights import restore_weight, round_weight, weight_scale
from ...model.layers import Layer
from ...utils.distributed import from_main
from ...utils.files import identity
from ...utils.precision import full_float32
from ...utils.store import Store
from .conv_hessian import slides
from .hessian import Moments, conv_groups
from .prefix_walk import PrefixWalk

# Limit of the second moments in memory: a wide grouped convolution takes a few
# groups at a time.
MOMENT_BYTES = 2 * 10**9


class Solve(Protocol):
    """Finds the integers of weight rows that see the same inputs."""

    #: Whether it needs E[x q'].
    cross: bool

    def __call__(
        self,
        weight: torch.Tensor,
        bits: int,
        method: str,
        gram: torch.Tensor,
        cross: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Solves.

        Arguments
        ---------
        weight : torch.Tensor
            float32 [out, inputs].
        bits : int
            Bits of the integers.
        method : str
            Calibrator of their scales.
        gram, cross : torch.Tensor
            E[q q'] and E[x q'].

        Returns
        -------
        torch.Tensor
            int8 [out, inputs].
        torch.Tensor
            float32 scales [out].
        """


@dataclass
class LayerStore:
    """Finished layers on disk, so that a killed run resumes.

    ``key`` identifies all that decides the result; ``reused`` counts the layers
    that were found.
    """

    store: Store
    key: str
    reused: int = field(default=0, init=False)

    def _file(self, name: str) -> str:
        # Results of other settings are kept in the same folder.
        return f"{identity([self.key, name])}.safetensors"

    def read(self, name: str) -> LayerTensors | None:
        """A finished layer, or None."""
        known = self.store.read_tensors(
            self._file(name), self.key, "finished layer"
        )
        found = from_main(None if known is None else LayerTensors(**known[0]))
        self.reused += found is not None
        return found

    def write(self, name: str, tensors: LayerTensors) -> None:
        """Stores a finished layer."""
        parts = {k: v for k, v in vars(tensors).items() if v is not None}
        self.store.write_tensors(self._file(name), self.key, parts, name)


@full_float32()  # TF32 has too few bits for second moments
def refine(
    walk: PrefixWalk,
    quants: Mapping[str, LayerQuant],
    store: LayerStore,
    solve: Callable[[Layer], Solve | None] = lambda _: None,
    corrects_bias: Callable[[Layer], bool] = lambda _: False,
    on_layer: Callable[[str], None] = lambda _: None,
) -> dict[str, LayerTensors]:
    """Decides layer by layer, each behind the decided ones before it.

    Arguments
    ---------
    walk : PrefixWalk
        Computes the moments; its simulator takes the decided integers.
    quants : Mapping
        LayerQuant by name; other layers stay float.
    store : LayerStore
        Finished layers.
    solve : callable
        Solver of a layer; None for the nearest integers.
    corrects_bias : callable
        Whether a layer's bias compensates the mean error of its output.
    on_layer : callable
        Called with the name of each finished layer.

    Returns
    -------
    dict
        LayerTensors by name.
    """
    decided: dict[str, LayerQuant] = {}
    result: dict[str, LayerTensors] = {}
    for group in walk.groups():
        layers = [layer for layer in group if layer.name in quants]
        found = {layer.name: store.read(layer.name) for layer in layers}
        problems = [
            _Problem(layer, quants[layer.name], solve(layer))
            for layer in layers
            if found[layer.name] is None
        ]
        # One pass serves all layers of a group: they see the same inputs.
        for same in _same_inputs(problems):
            for problem, tensors in _solve_together(
                walk, same, decided, corrects_bias
            ):
                name = problem.layer.name
                found[name] = tensors
                store.write(name, tensors)
        for layer in layers:
            result[layer.name] = found[layer.name]
            walk.simulator.tensors[layer.name] = found[layer.name]
            decided[layer.name] = quants[layer.name]
            on_layer(layer.name)
    return result


@dataclass
class _Problem:
    layer: Layer
    quant: LayerQuant
    solve: Solve | None


def _same_inputs(problems: list[_Problem]) -> list[list[_Problem]]:
    """Groups problems whose inputs are quantized and unfolded alike."""
    alike: dict[tuple, list[_Problem]] = {}
    for problem in problems:
        quant, module = problem.quant, problem.layer.module
        key = (
            quant.activation_bits,
            quant.activation_amax,
            quant.activation_offset,
            getattr(module, "kernel_size", None),
            getattr(module, "stride", None),
            getattr(module, "padding", None),
            getattr(module, "dilation", None),
            conv_groups(module),
        )
        alike.setdefault(key, []).append(problem)
    return list(alike.values())


def _solve_together(
    walk: PrefixWalk,
    problems: list[_Problem],
    decided: Mapping[str, LayerQuant],
    corrects_bias: Callable[[Layer], bool],
) -> Iterator[tuple[_Problem, LayerTensors]]:
    first = problems[0]
    solves = [p.solve for p in problems if p.solve is not None]
    centered = [corrects_bias(p.layer) for p in problems]
    if not solves and not any(centered):
        for problem in problems:
            yield problem, _nearest(problem)
        return
    second = bool(solves)
    cross = any(solve.cross for solve in solves)
    count = conv_groups(first.layer.module)
    inputs = first.layer.module.weight[0].numel()
    held = 4 * inputs**2 * (1 + cross) if second else 1
    step = max(1, min(count, MOMENT_BYTES // held))
    if slides(first.layer.module):
        step = count  # lags are compact: one pass for all groups
    weights = [p.layer.module.weight.detach().float() for p in problems]
    parts: list[list[tuple]] = [[] for _ in problems]
    for start in range(0, count, step):
        chunk = slice(start, min(start + step, count))
        moments = walk.moments(
            first.layer, first.quant, decided, second, cross, chunk
        )
        for i, problem in enumerate(problems):
            rows = weights[i].view(count, -1, inputs)[chunk]
            for g, weight in enumerate(rows):
                parts[i].append(
                    _solve_rows(problem, weight, moments, g, centered[i])
                )
        del moments
    for i, problem in enumerate(problems):
        yield problem, _joined(problem, weights[i], parts[i], centered[i])


def _nearest(problem: _Problem) -> LayerTensors:
    quant = problem.quant
    weight = problem.layer.module.weight.detach().float()
    scale = weight_scale(weight, quant.weight_bits, quant.weight_method)
    return LayerTensors(round_weight(weight, scale, quant.weight_bits), scale)


def _solve_rows(
    problem: _Problem,
    weight: torch.Tensor,
    moments: Moments,
    g: int,
    centered: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers, scales and mean output error of the rows of one group."""
    quant = problem.quant
    bits, method = quant.weight_bits, quant.weight_method
    mean, float_mean = moments.mean[g], moments.float_mean[g]
    if problem.solve is None:
        scale = weight_scale(weight, bits, method)
        integers = round_weight(weight, scale, bits)
    else:
        gram = moments.gram[g]
        cross = moments.cross[g] if problem.solve.cross else None
        if centered:
            # The bias compensates the mean error: minimize the rest.
            gram = gram - torch.outer(mean, mean)
            if cross is not None:
                cross = cross - torch.outer(float_mean, mean)
        try:
            integers, scale = problem.solve(weight, bits, method, gram, cross)
        except ValueError as error:
            raise ValueError(f"{problem.layer.name}: {error}") from error
    grid = restore_weight(integers, scale)
    return integers, scale, weight @ float_mean - grid @ mean


def _joined(
    problem: _Problem,
    weight: torch.Tensor,
    parts: list[tuple],
    centered: bool,
) -> LayerTensors:
    integers, scale, error = (
        torch.cat(part) for part in zip(*parts, strict=True)
    )
    bias = None
    if centered:
        own = problem.layer.module.bias
        bias = error if own is None else own.detach().float() + error
    return LayerTensors(integers.view(weight.shape), scale, bias)
