"""The decisions of a run, with reasons: plan.json, and tensors beside it."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..model.layer import KINDS, Layer
from ..utils.files import plain_name, read_json, write_json
from ..utils.typed import one_line, short, typed
from .affine import FLOAT_BITS, MAX_BITS, MIN_BITS
from .layer_quant import LayerQuant
from .parts import Part
from .plan_tensors import (
    AdjustedTensors,
    parameters_by_name,
    read_tensors,
    write_tensors,
)

PLAN_FILE = "plan.json"
PLAN_FORMAT = 1

_MAX_NAME = 500
_LARGEST = 3.4028234663852886e38  # float32


@dataclass(frozen=True)
class LayerPlan:
    name: str  # name, unit and kind: as in model.layer.Layer
    unit: str
    kind: str
    quant: LayerQuant | None  # None: the layer stays float
    observed_max: float  # largest magnitude of the input in calibration
    cutoff: float  # clipping percentile; 100: nothing is clipped
    reason: str  # one sentence
    # share of the input's values in calibration that are larger than the range,
    # and cut to it; None of a float input, and in earlier plans
    beyond: float | None = None

    @property
    def bits(self) -> str:
        """Such as W8A8; W8 if the weight alone is in integers; or float."""
        if self.quant is None:
            return "float"
        bits = f"W{self.quant.weight_bits}"
        if not self.quant.weight_only:
            bits += f"A{self.quant.activation_bits}"
        return bits


@dataclass(frozen=True)
class UnitPlan:
    """What the search measured for one unit."""

    name: str
    # WER in percent with this unit alone quantized by MAX calibration, its
    # difference from the float model, and the ends of the difference's paired
    # interval; None without a search
    wer: float | None = None
    delta_wer: float | None = None
    delta_wer_ci: list[float] | None = None
    selected: bool = False  # whether the clipping percentile was searched
    cutoff: float = 100.0  # chosen clipping percentile
    # {"cutoff", "wer", "secondary", "complete"} by percentile tried; with
    # complete false, wer is a lower bound
    curve: list[dict] = field(default_factory=list)


@dataclass(frozen=True)
class _Point:
    """A row of a unit's curve."""

    cutoff: float
    wer: float | None
    secondary: float | None = None
    complete: bool = True


@dataclass(frozen=True)
class _Beside:
    """The plan's reference to the file of its tensors."""

    file: str
    sha256: str


@dataclass(frozen=True)
class QuantizationPlan:
    """A whole plan, as written to ``plan.json``.

    Arguments
    ---------
    method : str
        The method that made it.
    weight_bits, activation_bits : int
        Bits asked for.
    fingerprint : str
        Of the float weights that it was made for.
    settings : dict
        The settings that decided it.
    search : dict
        What the search measured over all; empty without a search.
    units : list of UnitPlan
        In network order.
    layers : list of LayerPlan
        In network order.
    tensors : AdjustedTensors or None
        Integers and float parameters that a method decided, in a file of
        their own.
    weight_only : list of str
        Parameters of no layer that are stored as integers of 8 bits and
        multiplied in floating point.
    parts : list of Part
        What is executed as a whole; empty where a runtime has its own way.
    residual_amax : float or None
        The largest value of an encoder's residual stream while calibrating;
        None if it was not recorded.
    """

    method: str
    weight_bits: int
    activation_bits: int
    fingerprint: str
    settings: dict
    search: dict
    units: list[UnitPlan]
    layers: list[LayerPlan]
    tensors: AdjustedTensors | None = field(
        default=None, compare=False, repr=False
    )
    weight_only: list[str] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    residual_amax: float | None = None

    def quants(self) -> dict[str, LayerQuant]:
        """Returns the quantized layers by name."""
        return {x.name: x.quant for x in self.layers if x.quant is not None}

    def save(self, path: str | Path, with_tensors: bool = True) -> None:
        """Writes the plan as JSON, atomically.

        Tensors are written beside it, with the ending ``.safetensors``, or
        only referred to.
        """
        path = Path(path)
        raw: dict[str, Any] = {"format": PLAN_FORMAT}
        raw |= {f.name: getattr(self, f.name) for f in fields(self)}
        raw["units"] = [asdict(unit) for unit in self.units]
        raw["layers"] = [
            asdict(layer) | {"quant": layer.quant and layer.quant.to_dict()}
            for layer in self.layers
        ]
        raw["parts"] = [asdict(part) for part in self.parts]
        del raw["tensors"]
        # Files of plans without them stay the same.
        for key in ("weight_only", "parts", "residual_amax"):
            if not raw[key]:
                del raw[key]
        if self.tensors:
            bits = {n: q.weight_bits for n, q in self.quants().items()}
            file = path.with_suffix(".safetensors")
            # Tensors first, so that a plan never names a missing file.
            place = file if with_tensors else None
            sha256 = write_tensors(place, self.tensors, bits)
            raw["tensors"] = {"file": file.name, "sha256": sha256}
        write_json(path, raw)

    @classmethod
    def load(
        cls, path: str | Path, with_tensors: bool = True
    ) -> "QuantizationPlan":
        """Reads a plan.

        Arguments
        ---------
        path : str or Path
            A ``plan.json``.
        with_tensors : bool
            Whether to read the tensors beside it; the weights file of a
            folder contains them already.

        Returns
        -------
        QuantizationPlan

        Raises
        ------
        ValueError
            Either file is missing, damaged or something else.
        """
        raw = read_json(path, "quantization plan")
        if not isinstance(raw, dict) or raw.pop("format", 0) != PLAN_FORMAT:
            raise ValueError(
                f"{path}: not a quantization plan of format {PLAN_FORMAT}; "
                "give the plan.json of a finished run"
            )
        try:
            beside = typed(raw.pop("tensors", None), _Beside | None, "tensors")
            plan = typed(raw, cls, "plan")
            plan._check()
            if beside is None or not with_tensors:
                return plan
            name = plain_name(beside.file)
        except ValueError as error:
            raise ValueError(
                f"{path}: damaged plan ({one_line(error)}); make it again"
            ) from error
        tensors = read_tensors(Path(path).with_name(name), beside.sha256)
        return replace(plan, tensors=tensors)

    def _check(self) -> None:
        for kind, rows in (("unit", self.units), ("layer", self.layers)):
            seen = set()
            for row in rows:
                # Names are used in messages and in tensor names.
                name = row.name
                if not name.isprintable() or not 0 < len(name) <= _MAX_NAME:
                    raise ValueError(f"a {kind}'s name cannot be {short(name)}")
                if name in seen:
                    raise ValueError(f"{kind} '{name}' is there twice")
                seen.add(name)
        for unit in self.units:
            where, interval = f"unit '{unit.name}'", unit.delta_wer_ci
            _require(
                unit,
                where,
                cutoff=0 < unit.cutoff <= 100,
                delta_wer_ci=interval is None or len(interval) == 2,
            )
            for i, point in enumerate(unit.curve):
                typed(point, _Point, f"{where}.curve[{i}]")
        for layer in self.layers:
            where = f"layer '{layer.name}'"
            _require(
                layer,
                where,
                kind=layer.kind in KINDS.values(),
                observed_max=layer.observed_max >= 0,
                cutoff=0 < layer.cutoff <= 100,
                beyond=0 <= (layer.beyond or 0) <= 1,
            )
            if layer.quant is not None:
                _check_quant(layer.quant, where)

    def check_fits(
        self,
        layers: Iterable[Layer],
        modules: Mapping[str, nn.Module],
        path: str,
    ) -> None:
        """Raises unless the plan fits a model; ``path`` names it."""
        layers = list(layers)
        found = {layer.name: layer.kind for layer in layers}
        planned = {layer.name: layer.kind for layer in self.layers}
        for name in [*planned, *found]:
            if planned.get(name) != found.get(name):
                where = "the model" if name in planned else "the plan"
                raise ValueError(
                    f"quantize.plan: {path}: layer '{name}' is not in {where} "
                    "or is of another kind; use the plan of this model and "
                    "the same target, include and exclude"
                )
        state = parameters_by_name(modules)
        for name in self.weight_only:
            if name not in state:
                raise ValueError(
                    f"quantize.plan: {path}: parameter {short(name)} is not "
                    "in the model; use the plan of this model"
                )
        if self.tensors is None:
            return
        quants = self.quants()
        for name in self.tensors.layers:
            if name not in quants:
                raise ValueError(
                    f"quantize.plan: {path}: has integers of layer '{name}', "
                    "which it does not quantize; make it again"
                )
        shapes = {layer.name: layer.module.weight.shape for layer in layers}
        self.tensors.check_fits(shapes, modules, path)


def _check_quant(quant: LayerQuant, where: str) -> None:
    widths = range(MIN_BITS, MAX_BITS + 1)
    _require(
        quant,
        where,
        weight_bits=quant.weight_bits in widths,
        activation_bits=quant.activation_bits in (*widths, FLOAT_BITS),
        activation_amax=0 <= quant.activation_amax <= _LARGEST,
        weight_method=quant.weight_method in ("max", "mse"),
        activation_offset=abs(quant.activation_offset) <= _LARGEST,
    )


def _require(row: Any, where: str, **checks: bool) -> None:
    """Raises for the first field whose check fails."""
    for key, good in checks.items():
        if not good:
            value = short(getattr(row, key))
            raise ValueError(f"{where}: {key} cannot be {value}")
