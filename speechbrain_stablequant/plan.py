"""The decisions of a quantization run: what was chosen for each layer, why."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from .adjusted import AdjustedTensors
from .files import read_json, write_json
from .layers import Layer
from .numerics import MAX_BITS, MIN_BITS

PLAN_FORMAT = 1


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
        Largest \\|input\\| that is represented.
    weight_method : str
        ``"max"`` or ``"mse"``: the calibrator of the weight's channels.
    activation_offset : float
        Subtracted from the input before it is quantized, so that a lopsided
        input uses all integers; a whole number of quantization steps.
    weight_group : int
        0: one weight scale per output channel. Else so many neighbouring
        inputs of a Linear share one.
    """

    weight_bits: int
    activation_bits: int
    activation_amax: float
    weight_method: str = "max"
    activation_offset: float = 0.0
    weight_group: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The fields, without those that only some methods use and this
        layer does not: files and keys of all others stay as they are.

        Example
        -------
        >>> sorted(LayerQuant(8, 8, 1.0, weight_group=64).to_dict())
        ['activation_amax', 'activation_bits', 'weight_bits', \
'weight_group', 'weight_method']
        """
        raw = asdict(self)
        for name in ("activation_offset", "weight_group"):
            if not raw[name]:
                del raw[name]
        return raw

    @property
    def extras(self) -> frozenset[str]:
        """What a runtime must be able to do beyond plain integers."""
        return layer_extras(self.activation_offset, self.weight_group)


def layer_extras(activation_offset: float, weight_group: int) -> frozenset[str]:
    """What a layer needs of a runtime, by the names of the switches.

    Arguments
    ---------
    activation_offset : float
        As of :class:`LayerQuant`.
    weight_group : int
        As of :class:`LayerQuant`.

    Returns
    -------
    frozenset of str
        Of ``"asymmetric"`` and ``"weight_groups"``.
    """
    needs = {
        "asymmetric": activation_offset != 0,
        "weight_groups": weight_group != 0,
    }
    return frozenset(name for name, needed in needs.items() if needed)


def _read_quant(raw: Mapping | None, name: str) -> LayerQuant | None:
    """A plan is a file that a user may edit: its numbers are checked."""
    if raw is None:
        return None
    quant = LayerQuant(**raw)

    def is_number(value: Any) -> bool:
        real = isinstance(value, int | float) and not isinstance(value, bool)
        return real and math.isfinite(value)

    checks = {
        "weight_bits": lambda x: x in range(MIN_BITS, MAX_BITS + 1),
        "activation_bits": lambda x: x in range(MIN_BITS, MAX_BITS + 1),
        "activation_amax": lambda x: is_number(x) and x >= 0,
        "activation_offset": is_number,
        "weight_method": lambda x: x in ("max", "mse"),
        "weight_group": lambda x: isinstance(x, int) and x >= 0,
    }
    for key, good in checks.items():
        value = getattr(quant, key)
        if not good(value):
            raise ValueError(f"layer '{name}': {key} cannot be {value!r}")
    return quant


@dataclass(frozen=True)
class LayerPlan:
    """What was decided for one layer.

    Arguments
    ---------
    name, unit, kind : str
        As in :class:`~speechbrain_stablequant.layers.Layer`.
    quant : LayerQuant or None
        None: the layer stays float.
    observed_max : float
        Largest \\|input\\| seen in calibration.
    cutoff : float
        Cut-off ratio in percent; 100 means that nothing was cut.
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
    """What the search found out about one unit.

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
        Whether the unit's outliers were searched.
    cutoff : float
        Chosen cut-off ratio in percent.
    curve : list of dict
        ``{"cutoff", "wer", "secondary", "complete"}`` for each ratio tried;
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
        What a method decided beyond numbers: integers, biases, parameters of
        normalisations. Kept in a file beside the plan's.
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
        """The quantized layers by name."""
        return {
            layer.name: layer.quant
            for layer in self.layers
            if layer.quant is not None
        }

    @property
    def extras(self) -> frozenset[str]:
        """What a runtime must be able to do beyond plain integers."""
        return frozenset().union(*(q.extras for q in self.quants().values()))

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON, whole or not at all.

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
            # First the tensors: a plan that names them finds them.
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
            Whether the tensors beside it are read as well; a quantized
            folder's own file has them already.

        Returns
        -------
        QuantizationPlan

        Raises
        ------
        ValueError
            The file or that of its tensors is missing, damaged or something
            else.
        """
        raw = read_json(path, "quantization plan")
        if not isinstance(raw, dict) or raw.get("format") != PLAN_FORMAT:
            raise ValueError(
                f"{path}: not a quantization plan of format {PLAN_FORMAT}; "
                "give the plan.json of a finished run"
            )
        try:
            beside = raw.pop("tensors", None)
            plan = cls._from_dict(raw)
            if beside is None or not with_tensors:
                return plan
            name, sha256 = str(beside["file"]), beside["sha256"]
            if Path(name).name != name:
                raise KeyError(f"tensors in {name}")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: damaged plan ({error}); make it again"
            ) from error
        tensors = AdjustedTensors.load(Path(path).with_name(name), sha256)
        return replace(plan, tensors=tensors)

    @classmethod
    def _from_dict(cls, raw: Mapping) -> "QuantizationPlan":
        fields = {k: v for k, v in raw.items() if k != "format"}
        fields["units"] = [UnitPlan(**unit) for unit in fields["units"]]
        fields["layers"] = [
            LayerPlan(
                **{
                    **layer,
                    "quant": _read_quant(layer["quant"], layer["name"]),
                }
            )
            for layer in fields["layers"]
        ]
        return cls(**fields)

    def check_matches(self, names: Mapping[str, str], path: str) -> None:
        """Raises unless the plan is about exactly these layers.

        Arguments
        ---------
        names : Mapping
            Kind of each layer of the model by name.
        path : str
            Where the plan came from, for the error.

        Raises
        ------
        ValueError
            Names the first layer that differs.
        """
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
        """Raises unless the plan's tensors fit the model.

        Arguments
        ---------
        layers : iterable of Layer
            The layers of the model.
        modules : Mapping
            Its modules by key.
        path : str
            Where the plan came from, for the error.

        Raises
        ------
        ValueError
            Names the first tensor that does not fit.
        """
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
