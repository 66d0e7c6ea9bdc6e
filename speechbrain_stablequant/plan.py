"""The decisions of a quantization run: what was chosen for each layer, why."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .files import read_json, write_json

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
    """

    weight_bits: int
    activation_bits: int
    activation_amax: float
    weight_method: str = "max"


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
    """

    method: str
    weight_bits: int
    activation_bits: int
    fingerprint: str
    settings: dict
    search: dict
    units: list[UnitPlan]
    layers: list[LayerPlan]

    def quants(self) -> dict[str, LayerQuant]:
        """The quantized layers by name."""
        return {
            layer.name: layer.quant
            for layer in self.layers
            if layer.quant is not None
        }

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON, whole or not at all.

        Arguments
        ---------
        path : str or Path
            The file to write.
        """
        write_json(path, {"format": PLAN_FORMAT, **asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> "QuantizationPlan":
        """Reads a plan.

        Arguments
        ---------
        path : str or Path
            A ``plan.json``.

        Returns
        -------
        QuantizationPlan

        Raises
        ------
        ValueError
            The file is missing, is not JSON or is not a plan.
        """
        raw = read_json(path, "quantization plan")
        if not isinstance(raw, dict) or raw.get("format") != PLAN_FORMAT:
            raise ValueError(
                f"{path}: not a quantization plan of format {PLAN_FORMAT}; "
                "give the plan.json of a finished run"
            )
        try:
            return cls._from_dict(raw)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: damaged plan ({error}); make it again"
            ) from error

    @classmethod
    def _from_dict(cls, raw: Mapping) -> "QuantizationPlan":
        fields = {k: v for k, v in raw.items() if k != "format"}
        fields["units"] = [UnitPlan(**unit) for unit in fields["units"]]
        fields["layers"] = [
            LayerPlan(
                **{
                    **layer,
                    "quant": layer["quant"] and LayerQuant(**layer["quant"]),
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
