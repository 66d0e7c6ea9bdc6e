"""What a pass over the calibration set finds, and its file."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...core.histogram import Histogram
from ...utils.typed import typed

HISTOGRAM_FILE = "histograms.json"
WHAT = "calibration histograms"  #: what error messages call such a file


@dataclass(frozen=True)
class Calibration:
    """Result of a pass over the calibration set.

    ``histograms``: of |input|, by layer name. ``in_order``: whether layers were
    first called in the order of their units. ``residual``: the largest value of
    the residual streams; earlier versions did not record it.
    """

    histograms: dict[str, Histogram]
    in_order: bool
    residual: float | None = None

    def to_dict(self) -> dict:
        rows = {name: x.to_dict() for name, x in self.histograms.items()}
        residual = {} if self.residual is None else {"residual": self.residual}
        return {"in_order": self.in_order, "layers": rows, **residual}

    @classmethod
    def from_dict(
        cls, raw: Any, names: Sequence[str], num_bins: int
    ) -> "Calibration":
        """The inverse of :meth:`to_dict`; raises a ValueError if damaged."""
        rows = typed(raw, dict, "content")
        layers = typed(rows.get("layers"), dict, "layers")
        if set(layers) != set(names):
            raise ValueError("it has other layers")
        for name in names:
            if typed(layers[name], dict, name).get("num_bins") != num_bins:
                raise ValueError(f"{name}: does not have {num_bins} bins")
        return cls(
            {name: Histogram.from_dict(layers[name]) for name in names},
            typed(rows.get("in_order"), bool, "in_order"),
            typed(rows.get("residual"), float | None, "residual"),
        )
