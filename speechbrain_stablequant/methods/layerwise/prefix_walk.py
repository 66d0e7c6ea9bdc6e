"""A walk through the network, layer by layer, behind a quantized prefix."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Protocol

import torch
from torch import nn

from ...core.plan import LayerQuant
from ...model.layers import Cut, Layer
from ...simulation.fake_quant import Simulator, quantize_input
from ...simulation.observers import valid_frames
from ...simulation.prefix_cache import Replay, StopForward
from .conv_hessian import LagSum, signals, slides
from .hessian import Moments, MomentSum, unfolded


class Forward(Protocol):
    """Runs the model over the calibration set.

    Each batch runs ``turns`` times; ``before_batch`` gets its index each time;
    :class:`~...simulation.prefix_cache.StopForward` ends a pass.
    """

    def __call__(
        self,
        before_batch: Callable[[int], None],
        first_only: bool = False,
        turns: int = 1,
    ) -> object: ...


class PrefixWalk:
    """Computes moments of each layer's inputs, behind a quantized prefix.

    Arguments
    ---------
    simulator : Simulator
        Computes the decided layers; its ``tensors`` hold their integers.
    units : sequence of str
        Units in network order.
    forward : Forward
        Runs the calibration set.
    lengths : callable
        Padded and real samples of a batch, by its index.
    geometry : sequence of (int, int)
        Kernel and stride of the feature extractor's convolutions.
    cuts : sequence of Cut
        Where a forward pass can resume.
    limit_bytes : int
        Memory for activations at the cuts.
    """

    def __init__(
        self,
        simulator: Simulator,
        units: Sequence[str],
        forward: Forward,
        lengths: Callable[[int], tuple[int, Sequence[int]]],
        geometry: Sequence[tuple[int, int]] = (),
        cuts: Sequence[Cut] = (),
        limit_bytes: int = 0,
    ):
        self.simulator = simulator
        self.units = list(units)
        self.forward = forward
        self.lengths = lengths
        self.geometry = tuple(geometry)
        # For the float model and for the quantized prefix.
        self._replays = tuple(
            Replay(cuts, self.units, limit_bytes // 2) for _ in range(2)
        )

    def groups(self) -> list[list[Layer]]:
        """Layers in call order; those that read the same tensor together.

        Query, key and value are one group. Raises a ValueError for a layer
        that is called twice in a pass.
        """
        calls: list[tuple[Layer, torch.Tensor]] = []

        def hook(layer: Layer):
            def note(module: nn.Module, args: tuple) -> None:
                calls.append((layer, args[0]))

            return note

        layers = self.simulator.layers.values()
        handles = [
            layer.module.register_forward_pre_hook(hook(layer))
            for layer in layers
        ]
        try:
            self.forward(lambda _: None, first_only=True)
        finally:
            for handle in handles:
                handle.remove()
        groups: list[list[Layer]] = []
        seen: set[str] = set()
        last = None
        for layer, x in calls:
            if layer.name in seen:
                raise ValueError(
                    f"{layer.name}: is called twice in one forward pass, "
                    "which has no single input; add it to quantize.exclude"
                )
            seen.add(layer.name)
            if x is last and groups[-1][0].unit == layer.unit:
                groups[-1].append(layer)
            else:
                groups.append([layer])
            last = x
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
        """Moments of a layer's input.

        Arguments
        ---------
        layer : Layer
            The layer.
        quant : LayerQuant
            How its input is quantized.
        decided : Mapping
            LayerQuant of the layers before it, by name.
        second, cross : bool
            Which second moments are needed.
        groups : slice
            Groups of a convolution.

        Returns
        -------
        Moments
        """
        for replay, quants in zip(self._replays, ({}, decided), strict=True):
            self._prepare(replay, layer.unit, quants)
        middle, half = quant.activation_offset, quant.activation_amax
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

        handle = layer.module.register_forward_pre_hook(hook)
        with ExitStack() as around:
            stack = around.enter_context(ExitStack())

            def before_batch(index: int) -> None:
                nonlocal batch, turn
                stack.close()
                batch, turn = index, len(kept)
                if turn:
                    stack.enter_context(self.simulator.apply(decided))
                replay = self._replays[turn]
                if replay.holds(layer.unit):
                    replay.start_batch(index)
                    stack.enter_context(replay.active())

            try:
                self.forward(before_batch, turns=2)
            finally:
                handle.remove()
        try:
            return total.result()
        except ValueError as error:
            raise ValueError(f"{layer.name}: {error}") from error

    def _prepare(
        self, replay: Replay, unit: str, quants: Mapping[str, LayerQuant]
    ) -> None:
        layers = self.simulator.layers
        before = set(self.units[: self.units.index(unit)])
        earlier = {
            name: (layers[name].unit, quant)
            for name, quant in quants.items()
            if layers[name].unit in before
        }
        with self.simulator.apply(quants):
            if not replay.prepare(unit, earlier, self.forward):
                replay.drop()

    def _frames(
        self, layer: Layer, x: torch.Tensor, batch: int
    ) -> list[int] | None:
        """Real frames of each utterance; None if there is no padding."""
        total, lengths = self.lengths(batch)
        if all(n == total for n in lengths):
            return None
        if x.dim() != 3 or x.shape[0] != len(lengths):
            return None
        time_axis = 1 if layer.kind == "linear" else 2
        return valid_frames(x.shape[time_axis], total, lengths, self.geometry)
