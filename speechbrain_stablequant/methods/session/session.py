"""One recognizer that is being quantized."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ...config import CommonConfig
from ...core.histogram import Histogram
from ...core.layer_quant import LayerQuant
from ...core.plan import LayerPlan, QuantizationPlan, UnitPlan
from ...model.encoders import find_encoders
from ...model.layer import Cut, Layer
from ...model.layers import find_layers, group_units, weight_only_parameters
from ...simulation.fake_quant import Simulator
from ...utils.distributed import from_main, share
from ...utils.progress import progress_bar
from ...utils.store import Store
from ...utils.tensor_bytes import headed_digest
from .block_cuts import block_cuts
from .protocols import Recognizer

#: A plan, and histograms of its layers' inputs for the report.
Planned = tuple[QuantizationPlan, Mapping[str, Histogram]]


class Session:
    """A recognizer being quantized: its layers, units, config and store.

    Only the weights of the layers in ``weights_alone``, which says why, are
    quantized.
    """

    def __init__(
        self,
        recognizer: Recognizer,
        config: CommonConfig,
        store: Store,
        runtimes: Iterable[str],
        weights_alone: Mapping[str, str] | None = None,
    ):
        self.recognizer = recognizer
        self.weights_alone = weights_alone or {}
        if (
            config.plan is None
            and config.search.rule is None
            and recognizer.autoregressive
        ):
            search = replace(config.search, rule="divergence")
            config = replace(config, search=search)
        self.config = config
        self.store = store
        self.runtimes = runtimes
        self.layers = find_layers(
            recognizer.modules, config.target, config.include, config.exclude
        )
        self.units = group_units(self.layers)
        self.weight_only = weight_only_parameters(
            recognizer.modules, config.target, config.include, config.exclude
        )
        self.encoders = find_encoders(
            {key: recognizer.modules[key] for key in config.target}
        )
        self.simulator = Simulator(self.layers)
        self._block_cuts: list[Cut] | None = None

    @property
    def by_divergence(self) -> bool:
        """Whether the divergence compares candidates, and WER confirms."""
        return self.config.search.rule == "divergence"

    def fingerprint(self) -> str:
        return from_main(fingerprint_modules(self.recognizer.modules))

    @property
    def clipped_layers(self) -> list[Layer]:
        """Layers whose inputs are quantized."""
        return [x for x in self.layers if x.name not in self.weights_alone]

    def assemble(
        self,
        weights: str,
        units: list[UnitPlan],
        quants: Mapping[str, LayerQuant],
        histograms: Mapping[str, Histogram],
        residual_amax: float | None,
        cutoffs: Mapping[str, float],
        reason: Callable[[Layer], str],
        search: dict,
    ) -> Planned:
        """A plan with this session's settings; ``reason`` explains a layer."""
        layers = []
        for layer in self.layers:
            quant = quants.get(layer.name)
            alone = quant is not None and quant.weight_only
            given = self.weights_alone.get(layer.name) if alone else None
            layers.append(
                LayerPlan(
                    name=layer.name,
                    unit=layer.unit,
                    kind=layer.kind,
                    quant=quant,
                    observed_max=histograms[layer.name].max,
                    cutoff=100.0 if alone else cutoffs[layer.name],
                    reason=given or reason(layer),
                    beyond=share_beyond(quant, histograms[layer.name]),
                )
            )
        plan = QuantizationPlan(
            method=self.config.method,
            weight_bits=self.config.weight_bits,
            activation_bits=self.config.activation_bits,
            fingerprint=weights,
            settings=json.loads(json.dumps(self.config.settings())),
            search=search,
            units=units,
            layers=layers,
            weight_only=self.weight_only,
            residual_amax=residual_amax,
        )
        return plan, histograms

    def quant(
        self,
        layer: str,
        amax: float,
        weight_method: str,
        bits: tuple[int, int] | None = None,
        offset: float = 0.0,
    ) -> LayerQuant:
        """A layer quantized with the block's precision, or with ``bits`` of
        weights and activations."""
        config = self.config
        weight, inputs = bits or (config.weight_bits, config.activation_bits)
        least = self.simulator.layers[layer].least_bits
        weight, inputs = max(weight, least), max(inputs, least)
        quant = LayerQuant(
            weight, inputs, float(amax), weight_method, float(offset)
        )
        alone = layer in self.weights_alone
        return quant.with_float_input() if alone else quant

    def prefix(
        self, quants: Mapping[str, LayerQuant], unit: str
    ) -> dict[str, tuple[str, LayerQuant]]:
        """The quants of layers before a unit, each with its own unit."""
        units = list(self.units)
        before = set(units[: units.index(unit)])
        layers = self.simulator.layers
        return {
            name: (layers[name].unit, quant)
            for name, quant in quants.items()
            if layers[name].unit in before
        }

    def geometry(self) -> list[tuple[int, int]]:
        if len(self.encoders) != 1:
            return []
        return self.encoders[0].conv_geometry()

    def cuts(self, in_order: bool) -> list[Cut]:
        """Where a pass can resume if layers are called in order."""
        if not in_order or not self.cache_bytes:
            return []
        if len(self.encoders) != 1:
            if self._block_cuts is None:
                forward = self.recognizer.forward
                self._block_cuts = block_cuts(
                    self.recognizer.modules,
                    self.units,
                    partial(forward, "calibration", first_only=True),
                    partial(self.recognizer.outputs, "calibration"),
                    self.cache_bytes,
                )
            return self._block_cuts
        cuts = self.encoders[0].cuts()
        return [cut for cut in cuts if cut.unit in self.units]

    @property
    def cache_bytes(self) -> int:
        return int(self.config.search.cache_gb * 1e9)

    def batches(self, subset: str) -> int:
        """Batches of this process's share of a subset."""
        config = self.config
        part = config.calibration if subset == "calibration" else config.search
        ids = self.recognizer.ids(subset)
        return len(share(-(-len(ids) // part.batch_size)))

    def bar(self, total: int, what: str, **options: Any) -> tqdm:
        """A progress bar that is shown as the recognizer's are."""
        shown = self.recognizer.show_progress
        return progress_bar(None, what, shown, total=total, **options)


def share_beyond(
    quant: LayerQuant | None, histogram: Histogram
) -> float | None:
    """The share of a layer's inputs that its range cuts; None without one."""
    if quant is None or quant.weight_only:
        return None
    return histogram.share_above(quant.largest)


def fingerprint_modules(modules: Mapping[str, nn.Module]) -> str:
    """Identifies names and values of weights: 32 hex digits of a SHA-256."""
    return headed_digest(
        (f"{key}.{name}:{tuple(value.shape)}", value)
        for key, module in modules.items()
        for name, value in module.state_dict().items()
        if isinstance(value, torch.Tensor)
    )
