"""The decisions of a quantization run for each layer, with reasons."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..model.layers import Layer
from ..utils.files import plain_name, read_json, write_json
from ..utils.typed import one_line, short, typed
from .affine import MAX_BITS, MIN_BITS
from .plan_tensors import AdjustedTensors

PLAN_FILE = "plan.json"
PLAN_FORMAT = 1

_LARGEST = 3.4028234663852886e38  # float32
_MAX_NAME = 500


@dataclass(frozen=True)
class LayerQuant:
    """How one layer is quantized.

    Arguments
    ---------
    weight_bits : int
        Bits of the weights, one scale per output channel.
    activation_bits : int
        Bits of the layer's input, one static scale.
    activation_amax : float
        Largest magnitude of the input that is represented.
    weight_method : str
        ``"max"`` or ``"mse"``: the calibrator of the weight's channels.
    activation_offset : float
        Subtracted from the input before quantization, so that an asymmetric
        input uses all integers; a whole number of steps.
    """

    weight_bits: int
    activation_bits: int
    activation_amax: float
    weight_method: str = "max"
    activation_offset: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON; the offset only where it is used, so
        that files and cache keys of other plans stay the same."""
        raw = asdict(self)
        if not self.activation_offset:
            del raw["activation_offset"]
        return raw


def read_quant(raw: Any, where: str) -> LayerQuant | None:
    """Reads and checks a layer's quantization from a file; None stays None."""
    if raw is None:
        return None
    quant = typed(raw, LayerQuant, where)
    widths = range(MIN_BITS, MAX_BITS + 1)
    checks = {
        "weight_bits": quant.weight_bits in widths,
        "activation_bits": quant.activation_bits in widths,
        "activation_amax": 0 <= quant.activation_amax <= _LARGEST,
        "activation_offset": abs(quant.activation_offset) <= _LARGEST,
        "weight_method": quant.weight_method in ("max", "mse"),
    }
    _require(checks, quant, where)
    return quant


def _require(checks: Mapping[str, bool], row: Any, where: str) -> None:
    for key, good in checks.items():
        if not good:
            value = short(getattr(row, key))
            raise ValueError(f"{where}: {key} cannot be {value}")


def _check_name(name: str, where: str) -> None:
    """Checks a layer's name, which is used in messages and in tensor names."""
    if not (name.isprintable() and 0 < len(name) <= _MAX_NAME):
        raise ValueError(f"{where}: name cannot be {short(name)}")


@dataclass(frozen=True)
class LayerPlan:
    """What was decided for one layer.

    Arguments
    ---------
    name, unit, kind : str
        As in :class:`~speechbrain_stablequant.model.layers.Layer`.
    quant : LayerQuant or None
        None: the layer stays float.
    observed_max : float
        Largest magnitude of the input in calibration.
    cutoff : float
        Clipping percentile; 100: nothing is clipped.
    reason : str
        One sentence.
    """

    name: str
    unit: str
    kind: str
    quant: LayerQuant | None
    observed_max: float
    cutoff: float
    reason: str


@dataclass(frozen=True)
class UnitPlan:
    """What the search measured for one unit.

    Arguments
    ---------
    name : str
        Name of the unit.
    wer, delta_wer : float or None
        WER in percent with this unit alone quantized by MAX calibration, and
        its difference from the float model; None without a search.
    delta_wer_ci : list of float or None
        Ends of the difference's paired interval, at the level of the search.
    selected : bool
        Whether the unit's clipping percentile was searched.
    cutoff : float
        Chosen clipping percentile.
    curve : list of dict
        ``{"cutoff", "wer", "secondary", "complete"}`` by percentile tried;
        with ``complete`` false, ``wer`` is a lower bound.
    """

    name: str
    wer: float | None = None
    delta_wer: float | None = None
    delta_wer_ci: list[float] | None = None
    selected: bool = False
    cutoff: float = 100.0
    curve: list[dict] = field(default_factory=list)


@dataclass(frozen=True)
class _Point:
    """A row of a unit's curve."""

    cutoff: float
    wer: float | None
    secondary: float | None = None
    complete: bool = True


def _read_unit(raw: Any, where: str) -> UnitPlan:
    unit = typed(raw, UnitPlan, where)
    _check_name(unit.name, where)
    interval = unit.delta_wer_ci
    _require(
        {
            "cutoff": 0 < unit.cutoff <= 100,
            "delta_wer_ci": interval is None or len(interval) == 2,
        },
        unit,
        f"unit '{unit.name}'",
    )
    for i, point in enumerate(unit.curve):
        typed(point, _Point, f"{where}.curve[{i}]")
    return unit


def _read_layer(raw: Any, where: str) -> LayerPlan:
    rows = typed(raw, dict, where)
    if "quant" not in rows:
        raise ValueError(f"{where}: lacks 'quant'")
    layer = typed({**rows, "quant": None}, LayerPlan, where)
    _check_name(layer.name, where)
    _require(
        {
            "kind": layer.kind in ("linear", "conv1d"),
            "observed_max": layer.observed_max >= 0,
            "cutoff": 0 < layer.cutoff <= 100,
        },
        layer,
        f"layer '{layer.name}'",
    )
    quant = read_quant(rows["quant"], f"layer '{layer.name}'")
    return replace(layer, quant=quant)


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

    def quants(self) -> dict[str, LayerQuant]:
        """Returns the quantized layers by name."""
        return {
            layer.name: layer.quant
            for layer in self.layers
            if layer.quant is not None
        }

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON, atomically.

        Arguments
        ---------
        path : str or Path
            The file to write. Tensors are written beside it, under the same
            name with the ending ``.safetensors``.
        """
        path = Path(path)
        raw: dict[str, Any] = {"format": PLAN_FORMAT}
        for name in (f.name for f in fields(self)):
            if name not in ("units", "layers", "tensors"):
                raw[name] = getattr(self, name)
        raw["units"] = [asdict(unit) for unit in self.units]
        raw["layers"] = [
            {
                **asdict(layer),
                "quant": layer.quant and layer.quant.to_dict(),
            }
            for layer in self.layers
        ]
        if self.tensors:
            bits = {n: q.weight_bits for n, q in self.quants().items()}
            file = path.with_suffix(".safetensors")
            # Tensors first, so that a plan never names a missing file.
            sha256 = self.tensors.save(file, bits)
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
        if not isinstance(raw, dict) or raw.get("format") != PLAN_FORMAT:
            raise ValueError(
                f"{path}: not a quantization plan of format {PLAN_FORMAT}; "
                "give the plan.json of a finished run"
            )
        try:
            beside = typed(raw.pop("tensors", None), dict | None, "tensors")
            plan = cls._from_dict(raw)
            if beside is None or not with_tensors:
                return plan
            named = typed(beside, _Beside, "tensors")
            name = plain_name(named.file)
        except ValueError as error:
            raise ValueError(
                f"{path}: damaged plan ({one_line(error)}); make it again"
            ) from error
        file = Path(path).with_name(name)
        tensors = AdjustedTensors.load(file, named.sha256)
        return replace(plan, tensors=tensors)

    @classmethod
    def _from_dict(cls, raw: Mapping) -> "QuantizationPlan":
        parts = {k: v for k, v in raw.items() if k != "format"}
        for key in ("units", "layers"):
            parts[key] = typed(parts.get(key), list, key)
        parts["units"] = [
            _read_unit(unit, f"units[{i}]")
            for i, unit in enumerate(parts["units"])
        ]
        parts["layers"] = [
            _read_layer(layer, f"layers[{i}]")
            for i, layer in enumerate(parts["layers"])
        ]
        for kind, rows in (
            ("unit", parts["units"]),
            ("layer", parts["layers"]),
        ):
            names = Counter(row.name for row in rows)
            twice = [name for name, count in names.items() if count > 1]
            if twice:
                raise ValueError(f"{kind} '{twice[0]}' is there twice")
        # Units and layers were checked above; check everything else.
        head = {**parts, "units": [], "layers": []}
        plan = typed(head, cls, "the plan")
        return replace(plan, units=parts["units"], layers=parts["layers"])

    def check_matches(self, names: Mapping[str, str], path: str) -> None:
        """Raises unless the plan covers exactly these layers, given as kind by
        name."""
        planned = {layer.name: layer.kind for layer in self.layers}
        for name in [*planned, *names]:
            if planned.get(name) != names.get(name):
                where = "the model" if name in planned else "the plan"
                raise ValueError(
                    f"quantize.plan: {path}: layer '{name}' is not in {where} "
                    "or is of another kind; use the plan of this model and "
                    "the same target, include and exclude"
                )

    def check_tensors(
        self,
        layers: Iterable[Layer],
        modules: Mapping[str, nn.Module],
        path: str,
    ) -> None:
        """Raises unless the plan's tensors fit the model."""
        if self.tensors is None:
            return
        quants = self.quants()
        for name in self.tensors.layers:
            if name not in quants:
                raise ValueError(
                    f"quantize.plan: {path}: has integers of layer '{name}', "
                    "which it does not quantize; make it again"
                )
        self.tensors.check_matches(layers, modules, path)
