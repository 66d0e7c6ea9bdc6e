"""Which modules of a recognizer are computed as a graph, layer by layer in
integers, or in float: decided by what can be captured, and by time."""

import functools
import logging
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from itertools import accumulate, chain
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from ...core.integer_layer import IntegerLayer
from ...core.layer_quant import LayerQuant
from ...core.parts import Part
from ...core.quantize_layer import integer_layer
from ...model.layer import Layer
from ...model.layers import visible_layers
from ...model.products import modules_by_name
from ...utils.patching import hooked, shadowed, shadowed_forwards
from ...utils.typed import one_line
from ..cpu import cpu_class, executed_integers
from .calls import Call, CaptureError
from .capture import capture_part
from .decoder import decode, decoder_part, first_calls
from .decoder_graph import is_decoder
from .executor import part_forward

logger = logging.getLogger(__name__)

#: Recognizes a batch; what it returns is compared.
Pass = Callable[[], Any]
#: Forwards that execute layers in place, one by one.
InPlace = Callable[[Mapping[str, IntegerLayer]], dict[nn.Module, Callable]]

#: Methods of a module that recognizers call in place of its forward, so that
#: what lies below is captured.
_ENTRIES = ("encode", "forward_encoder")
#: Passes over the calls of a part that are timed.
_ROUNDS = 3
#: Maximum number of calls of a part in a timed pass.
_MOST_CALLS = 6
#: Share of float's time that integers must save: without it chance decides
#: where both take the same time, and two runs end with different plans.
_LEAST_GAIN = 0.03


class Selection:
    """Decides the parts of a recognizer from its passes over some batches, of
    different lengths. ``layers`` are what the plan quantizes, with ``bits`` of
    weights and activations; ``options`` those of ``backend: openvino``.
    Without ``graphs``, parts are single layers that are called repeatedly."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        layers: Sequence[Layer],
        passes: Sequence[Pass],
        in_place: InPlace,
        bits: tuple[int, int],
        options: Mapping[str, Any],
        graphs: bool = True,
    ):
        self._graphs = graphs
        self._layers = {layer.name: layer for layer in layers}
        self._in_place = in_place
        self._options = options
        self._bits = bits
        self._recognize = passes[0]
        self._modules = {x.name: x.module for x in layers}
        if graphs:
            self._modules = _around(modules, self._layers)
        self._calls: dict[str, list[list[Call]]] = defaultdict(list)
        self._ranges: dict[str, float] = dict.fromkeys(self._layers, 0.0)
        with torch.no_grad():
            for recognize in passes:
                self._observe(recognize)

    def _observe(self, recognize: Pass) -> None:
        """One pass: the calls of modules, and the ranges of layers."""
        seen: dict[str, list[Call]] = {name: [] for name in self._modules}

        def note_call(name: str, _, args: tuple, kwargs: dict) -> None:
            # A search calls a layer hundreds of times.
            if self._graphs or len(seen[name]) < _MOST_CALLS:
                seen[name].append(Call(args, kwargs))

        def note_range(name: str, _, args: tuple) -> None:
            top = float(args[0].abs().max())
            self._ranges[name] = max(self._ranges[name], top)

        layers = self._layers.items()
        ranges = ((x.module, partial(note_range, name)) for name, x in layers)
        with ExitStack() as stack:
            for name, module in self._modules.items():
                hook = partial(note_call, name)
                stack.enter_context(
                    module.register_forward_pre_hook(hook, with_kwargs=True)
                )
            stack.enter_context(visible_layers(self._layers.values()))
            stack.enter_context(hooked(ranges))
            recognize()
        for name, calls in seen.items():
            self._calls[name].append(calls)

    def parts(self) -> list[Part]:
        """Decide all parts, in order."""
        if not self._graphs:
            return [
                self._timed(Part(name, "layers", "called repeatedly"), every)
                for name, calls in self._calls.items()
                if len(every := list(chain(*calls))) > len(calls)
            ]
        tops = [name for name in self._modules if "." not in name]
        found = [part for name in tops for part in self._visit(name)]
        return [part for part in found if part is not None]

    def _visit(self, name: str) -> Iterator[Part | None]:
        """Parts at or below a module, the largest ones that can be captured;
        None where nothing was captured."""
        calls, reason = self._calls[name], "called repeatedly"
        every = [call for row in calls for call in row]
        module = self._modules[name]
        if any(hasattr(module, entry) for entry in _ENTRIES):
            reason = "called by other methods than forward"
        elif is_decoder(module) or all(len(row) == 1 for row in calls):
            try:
                yield self._captured(name, every)
                return
            except CaptureError as error:
                reason = f"not captured ({error})"
                logger.info("'%s' is no graph: %s", name, error)
        below: list[Part | None] = []
        # Single blocks of a stack are not captured one by one.
        if not _is_stack(module):
            for child, _ in module.named_children():
                if f"{name}.{child}" in self._modules:
                    below += self._visit(f"{name}.{child}")
        if any(part is not None and part.way for part in below):
            yield from below
        elif every:
            yield self._timed(Part(name, "layers", reason), every)
        else:
            yield from below

    def _inside(self, name: str) -> dict[str, Layer]:
        return {
            n: layer
            for n, layer in self._layers.items()
            if n == name or n.startswith(f"{name}.")
        }

    def _captured(self, name: str, calls: list[Call]) -> Part:
        module, inside = self._modules[name], self._inside(name)
        if is_decoder(module):
            part = decoder_part(name, module, calls, inside)
        else:
            read = self._read(module, calls[0])
            part = capture_part(name, module, calls, inside, read)
        return self._timed(part, calls)

    def _read(self, module: nn.Module, call: Call) -> list[int]:
        """Positions of the outputs that matter to the recognizer; empty:
        all."""
        with torch.no_grad():
            leaves = tree_leaves(module(*call.args, **call.kwargs))
            places = [
                i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)
            ]
            if len(places) < 2:
                return []
            expected = self._recognize()
            forward = partial(_poisoned, module.forward, places[0])
            try:
                with shadowed(module, "forward", forward):
                    found = self._recognize()
            # What reads such an output may raise anything.
            except Exception:
                return []
        return places[:1] if _same(expected, found) else []

    def _timed(self, part: Part, calls: Sequence[Call]) -> Part:
        """The part with the fastest way to execute it; float where integers
        hardly gain."""
        module = self._modules[part.name]
        integers = executed_integers(
            {
                name: integer_layer(
                    layer, LayerQuant(*self._bits, self._ranges[name])
                )
                for name, layer in self._inside(part.name).items()
            },
            cpu_class(),
        )
        ways: dict[str, AbstractContextManager] = {}
        run: Callable[..., Any] = module
        try:
            if part.way:
                make = partial(
                    part_forward, part, module, integers, **self._options
                )
                if is_decoder(module):  # its steps have one length
                    make = functools.cache(make)
                ways["graph"] = lambda: shadowed(module, "forward", make())
            forwards = self._in_place(integers)
            ways["layers"] = partial(shadowed_forwards, forwards)
            ways["float"] = nullcontext
            if is_decoder(module):
                calls, steps = first_calls(calls)
                run = partial(decode, module, steps)
            step = -(-len(calls) // _MOST_CALLS)
            ms = timed_ways(run, calls[::step], ways)
        except Exception as error:
            text = f"{part.reason}; it was not timed ({one_line(error)})"
            return replace(part, reason=text)
        best = min(ms, key=ms.get)
        if ms[best] > (1 - _LEAST_GAIN) * ms["float"]:
            best = "float"
        rows = ", ".join(
            f"{name} {value:.{1 if value > 1 else 3}f}"
            for name, value in ms.items()
        )
        return replace(
            part,
            executes=best,
            reason=f"{part.reason}; in ms: {rows}",
            ms=ms,
        )


def _around(
    modules: Mapping[str, nn.Module], layers: Iterable[str]
) -> dict[str, nn.Module]:
    """The modules around layers by path, from the outside to the inside."""
    by_name = modules_by_name(modules)
    paths: dict[str, None] = {}
    for name in layers:
        *around, _ = accumulate(name.split("."), "{}.{}".format)
        paths |= dict.fromkeys(around)
    return {x: by_name[x] for x in sorted(paths, key=lambda x: x.count("."))}


def _is_stack(module: nn.Module) -> bool:
    """Whether a module is a list of like modules."""
    kinds = [type(child) for child in module.children()]
    return (
        isinstance(module, nn.ModuleList | nn.Sequential)
        and len(kinds) > 1
        and len(set(kinds)) == 1
    )


def _poisoned(
    forward: Callable[..., Any], kept: int, *args: Any, **kwargs: Any
) -> Any:
    """A forward whose outputs are NaN or, of integers, 0; all but one."""
    places = iter(range(1 << 30))

    def change(x: Any) -> Any:
        if next(places) == kept or not isinstance(x, torch.Tensor):
            return x
        fill = float("nan") if x.is_floating_point() else 0
        return torch.full_like(x, fill)

    return tree_map(change, forward(*args, **kwargs))


def _same(one: Any, two: Any) -> bool:
    """Whether two outputs of a recognizer are the same."""
    rows, others = tree_leaves(one), tree_leaves(two)
    return len(rows) == len(others) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(rows, others, strict=True)
    )


@torch.no_grad()
def timed_ways(
    run: Callable[..., Any],
    calls: Sequence[Call],
    ways: Mapping[str, Callable[[], AbstractContextManager]],
) -> dict[str, float]:
    """Milliseconds of a pass over calls by what executes it; all take
    turns. Each turn begins anew, with a call that is not counted: speech has
    hardly two utterances of one length, and a graph prepares each length."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(_ROUNDS):
        for name, way in ways.items():
            with way():
                first, *others = calls
                run(*first.args, **first.kwargs)
                start = time.perf_counter()
                for call in others or calls:
                    run(*call.args, **call.kwargs)
                seconds[name].append(time.perf_counter() - start)
    return {
        name: round(statistics.median(times) * 1e3, 3)
        for name, times in seconds.items()
    }
