"""A walk through the network, layer by layer, behind a quantized prefix."""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import nn

from ...core.layer_quant import LayerQuant
from ...model.layer import Layer
from ...model.layers import visible_layers
from ...simulation.fake_quant import quantize_input
from ...simulation.observers import real_frames
from ...simulation.prefix_cache import Replay, StopForward
from ...utils.patching import hooked
from ..session.session import Session
from .hessian import LagSum, Moments, MomentSum, signals, slides, unfolded


class PrefixWalk:
    """Computes moments of each layer's inputs, behind a quantized prefix."""

    def __init__(self, session: Session, in_order: bool):
        self.session = session
        self.simulator = session.simulator
        self.forward = partial(session.recognizer.forward, "calibration")
        cuts, limit = session.cuts(in_order), session.cache_bytes // 2
        # For the float model and for the quantized prefix.
        self._replays = tuple(
            Replay(cuts, session.units, limit) for _ in range(2)
        )

    def groups(self) -> list[list[Layer]]:
        """Layers in call order; those that read the same tensor together."""
        groups: list[list[Layer]] = []
        seen: set[str] = set()
        last: torch.Tensor | None = None

        def note(layer: Layer, module: nn.Module, args: tuple) -> None:
            nonlocal last
            if layer.name in seen:
                raise ValueError(
                    f"{layer.name}: is called twice in one forward pass, "
                    "which has no single input; add it to quantize.exclude"
                )
            seen.add(layer.name)
            if args[0] is last and groups[-1][0].unit == layer.unit:
                groups[-1].append(layer)
            else:
                groups.append([layer])
            last = args[0]

        layers = self.session.layers
        hooks = ((layer.module, partial(note, layer)) for layer in layers)
        with visible_layers(layers), hooked(hooks):
            self.forward(lambda _: None, first_only=True)
        return groups

    def moments(
        self,
        layer: Layer,
        quant: LayerQuant,
        decided: Mapping[str, LayerQuant],
        second: bool = True,
        cross: bool = True,
        groups: slice = slice(None),
    ) -> Moments:
        """Moments of a layer's input, quantized as ``quant`` says.

        ``decided``: layers before it; ``second``, ``cross``: which second
        moments are needed; ``groups``: of a convolution.
        """
        for replay, quants in zip(self._replays, ({}, decided), strict=True):
            with self.simulator.apply(quants):
                before = self.session.prefix(quants, layer.unit)
                if not replay.prepare(layer.unit, before, self.forward):
                    replay.drop()
        middle, half = quant.activation_offset, quant.activation_amax
        if quant.weight_only:
            half = math.inf
        edges = (middle - half, middle + half)
        if slides(layer.module):
            (kernel,) = layer.module.kernel_size
            total, taken = LagSum(kernel, second, cross, edges), signals
        else:
            total, taken = MomentSum(second, cross, edges), unfolded
        kept: list[torch.Tensor | list[torch.Tensor]] = []
        batch, turn = 0, 0

        def hook(module: nn.Module, args: tuple) -> None:
            x = args[0].detach().float()
            frames = self._frames(layer, x, batch)
            # The recipe may use 16 bits; sums need float32.
            with torch.autocast(x.device.type, enabled=False):
                if turn == 0:
                    kept.append(taken(module, x, frames, groups))
                    raise StopForward
                q = taken(module, quantize_input(x, quant), frames, groups)
                total.add(kept.pop(), q)
            raise StopForward

        stack = ExitStack()

        def before_batch(index: int) -> None:
            """The float model first, then the quantized prefix."""
            nonlocal batch, turn
            stack.close()
            batch, turn = index, len(kept)
            if turn:
                stack.enter_context(self.simulator.apply(decided))
            replay = self._replays[turn]
            if replay.holds(layer.unit):
                replay.start_batch(index)
                stack.enter_context(replay.active())

        with visible_layers([layer]), hooked([(layer.module, hook)]), stack:
            self.forward(before_batch, turns=2)
        try:
            return total.result()
        except ValueError as error:
            raise ValueError(f"{layer.name}: {error}") from error

    def _frames(
        self, layer: Layer, x: torch.Tensor, batch: int
    ) -> list[int] | None:
        """Real frames of each utterance; None if there is no padding."""
        total, lengths = self.session.recognizer.lengths("calibration", batch)
        time_axis = 1 if layer.kind == "linear" else 2
        geometry = self.session.geometry()
        return real_frames(x, time_axis, total, lengths, geometry)
