"""Decides integers and biases of all layers, one after the other."""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ...core.affine import dequantize, quantize, weight_scale
from ...core.layer_quant import LayerQuant, LayerTensors, quants_json
from ...model.layers import Layer
from ...utils import distributed
from ...utils.files import identity
from ...utils.precision import full_float32
from ...utils.store import Store
from ..session.session import Session
from .hessian import Moments, slides
from .prefix_walk import PrefixWalk

logger = logging.getLogger(__name__)

LAYER_FOLDER = "finished_layers"

# Limit of the second moments in memory: a wide grouped convolution takes a few
# groups at a time.
MOMENT_BYTES = 2 * 10**9


class Solve(Protocol):
    """Finds the integers of weight rows that see the same inputs."""

    cross: bool  #: whether it needs E[x q']

    def __call__(
        self,
        weight: torch.Tensor,
        bits: int,
        method: str,
        gram: torch.Tensor,
        cross: torch.Tensor | None,
        rows: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Integers, int8 [out, inputs], and their float32 scales [out], of
        float32 rows [out, inputs]; ``gram`` and ``cross``: E[q q'], E[x q'],
        means over ``rows`` inputs."""


@dataclass
class LayerStore:
    """Finished layers on disk, under a key of all that decides the result."""

    store: Store
    key: str
    reused: int = field(default=0, init=False)

    def _file(self, name: str) -> str:
        # Results of other settings are kept in the same folder.
        return f"{identity([self.key, name])}.safetensors"

    def read(self, name: str) -> LayerTensors | None:
        known = self.store.read_tensors(
            self._file(name), self.key, "finished layer"
        )
        found = distributed.from_main(
            None if known is None else LayerTensors(**known[0])
        )
        self.reused += found is not None
        return found

    def write(self, name: str, tensors: LayerTensors) -> None:
        parts = tensors.named()
        self.store.write_tensors(self._file(name), self.key, parts, name)


@dataclass
class _Problem:
    """A layer to solve; ``centered``: its bias takes the mean output error."""

    layer: Layer
    quant: LayerQuant
    solve: Solve | None
    centered: bool

    def nearest(
        self, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Integers and scales without the data."""
        bits = self.quant.weight_bits
        scale = weight_scale(weight, bits, self.quant.weight_method)
        return quantize(weight, scale, bits), scale


def rounded_layers(
    session: Session,
    weights: str,
    in_order: bool,
    quants: Mapping[str, LayerQuant],
    what: str,
    solve: Callable[[Layer], Solve | None],
    corrects_bias: Callable[[Layer], bool] = lambda _: False,
) -> dict[str, LayerTensors]:
    """Decides integers and biases layer by layer, cached on disk.

    ``weights``: fingerprint of the float model; ``in_order``: whether layers
    are called in the order of their units; ``quants``: other layers stay float;
    ``what``: name of the method. ``solve`` gives a layer's solver, None for the
    nearest integers; ``corrects_bias`` says whether its bias compensates the
    mean error of its output.
    """
    content = [
        "float64 moments of what is in the range, the best of five scales, "
        "dampening by rows",
        weights,
        session.recognizer.key("calibration", "inputs"),
        quants_json(quants),
        [
            [layer.name, repr(solve(layer)), corrects_bias(layer)]
            for layer in session.layers
            if layer.name in quants
        ],
    ]
    store = LayerStore(session.store.below(LAYER_FOLDER), identity(content))
    # The session's own simulator: weights fake-quantized here are reused
    # when the result is measured.
    session.simulator.tensors = {}
    walk = PrefixWalk(session, in_order)
    with session.bar(len(quants), f"{what}, rounding") as bar:

        def on_layer(name: str) -> None:
            bar.update(1)
            bar.set_postfix_str(name.rpartition(".")[2])

        found = refine(walk, quants, store, solve, corrects_bias, on_layer)
    missing = sorted(quants.keys() - found.keys())
    if missing:
        raise ValueError(
            f"{missing[0]}: was not called in the first batch; add it to "
            "quantize.exclude"
        )
    if store.reused:
        logger.info("%s: %d layers from disk", what, store.reused)
    if distributed.size() > 1:
        # Another GPU may round differently: all take the first one's.
        found = {name: tensors.cpu() for name, tensors in found.items()}
    return distributed.from_main(found)


@full_float32()  # TF32 has too few bits for second moments
def refine(
    walk: PrefixWalk,
    quants: Mapping[str, LayerQuant],
    store: LayerStore,
    solve: Callable[[Layer], Solve | None],
    corrects_bias: Callable[[Layer], bool] = lambda _: False,
    on_layer: Callable[[str], None] = lambda _: None,
) -> dict[str, LayerTensors]:
    """Decides layer by layer, each behind the decided ones before it."""
    decided: dict[str, LayerQuant] = {}
    result: dict[str, LayerTensors] = {}
    for group in walk.groups():
        layers = [layer for layer in group if layer.name in quants]
        found = {layer.name: store.read(layer.name) for layer in layers}
        # One pass serves all layers of a group whose inputs are quantized and
        # unfolded alike: they see the same inputs.
        alike: dict[tuple, list[_Problem]] = defaultdict(list)
        for layer in layers:
            if found[layer.name] is None:
                quant = quants[layer.name]
                problem = _Problem(
                    layer, quant, solve(layer), corrects_bias(layer)
                )
                alike[_input_key(problem)].append(problem)
        for same in alike.values():
            solved = _solve_together(walk, same, decided)
            for problem, tensors in zip(same, solved, strict=True):
                found[problem.layer.name] = tensors
                store.write(problem.layer.name, tensors)
        for layer in layers:
            result[layer.name] = found[layer.name]
            walk.simulator.tensors[layer.name] = found[layer.name]
            decided[layer.name] = quants[layer.name]
            on_layer(layer.name)
    return result


def _input_key(problem: _Problem) -> tuple:
    quant, module = problem.quant, problem.layer.module
    window = ("kernel_size", "stride", "padding", "dilation", "groups")
    return (
        quant.activation_bits,
        quant.activation_amax,
        quant.activation_offset,
        *(getattr(module, name, None) for name in window),
    )


def _solve_together(
    walk: PrefixWalk,
    problems: list[_Problem],
    decided: Mapping[str, LayerQuant],
) -> list[LayerTensors]:
    first = problems[0]
    module = first.layer.module
    weights = [p.layer.module.weight.detach().float() for p in problems]
    solves = [p.solve for p in problems if p.solve is not None]
    if not solves and not any(p.centered for p in problems):
        return [
            LayerTensors(*problem.nearest(weight))
            for problem, weight in zip(problems, weights, strict=True)
        ]
    cross = any(solve.cross for solve in solves)
    count, inputs = getattr(module, "groups", 1), module.weight[0].numel()
    step = count
    # Lags are compact: one pass for all groups.
    if solves and not slides(module):
        held = 8 * inputs**2 * (1 + cross)
        step = max(1, min(count, MOMENT_BYTES // held))
    parts: list[list[tuple]] = [[] for _ in problems]
    for start in range(0, count, step):
        chunk = slice(start, min(start + step, count))
        moments = walk.moments(
            first.layer, first.quant, decided, bool(solves), cross, chunk
        )
        for problem, weight, part in zip(problems, weights, parts, strict=True):
            for g, rows in enumerate(weight.view(count, -1, inputs)[chunk]):
                part.append(_solve_rows(problem, rows, moments, g))
        del moments
    return [
        _joined(problem, weight, part)
        for problem, weight, part in zip(problems, weights, parts, strict=True)
    ]


def _solve_rows(
    problem: _Problem, weight: torch.Tensor, moments: Moments, g: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers, scales and mean output error of the rows of one group."""
    quant = problem.quant
    mean, float_mean = moments.mean[g], moments.float_mean[g]
    if problem.solve is None:
        integers, scale = problem.nearest(weight)
    else:
        gram = moments.gram[g]
        cross = moments.cross[g] if problem.solve.cross else None
        if problem.centered:
            # The bias compensates the mean error: minimize the rest.
            gram = gram - torch.outer(mean, mean)
            if cross is not None:
                cross = cross - torch.outer(float_mean, mean)
        try:
            integers, scale = problem.solve(
                weight,
                quant.weight_bits,
                quant.weight_method,
                gram,
                cross,
                moments.rows,
            )
        except ValueError as error:
            raise ValueError(f"{problem.layer.name}: {error}") from error
    grid = dequantize(integers, scale)
    return integers, scale, weight @ float_mean - grid @ mean


def _joined(
    problem: _Problem, weight: torch.Tensor, parts: list[tuple]
) -> LayerTensors:
    integers, scale, error = map(torch.cat, zip(*parts, strict=True))
    bias = None
    if problem.centered:
        own = problem.layer.module.bias
        bias = error if own is None else own.detach().float() + error
    return LayerTensors(integers.view(weight.shape), scale, bias)
