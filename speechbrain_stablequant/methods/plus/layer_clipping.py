"""The clipping percentile of each layer, by the divergence it causes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...core.plan import LayerQuant
from ..search.score import Evaluate


@dataclass(frozen=True)
class LayerCutoff:
    """The clipping percentile of a layer, and the divergence of each tried."""

    layer: str
    cutoff: float
    curve: list[tuple[float, float]]


def search_layers(
    units: Mapping[str, Sequence[str]],
    grid: Sequence[float],
    quantize: Callable[[str, float], LayerQuant],
    evaluate: Evaluate,
) -> list[LayerCutoff]:
    """Searches the clipping percentile of each layer, everything else float.

    From the largest percentile down, until one is worse than the best: clipping
    more only gets worse from there.

    Arguments
    ---------
    units : Mapping
        Names of layers by unit.
    grid : sequence of float
        Percentiles to try.
    quantize : callable
        Of a layer and a percentile. Equal results are tried once.
    evaluate : Evaluate
        Measures the divergence, as its score's loss.

    Returns
    -------
    list of LayerCutoff

    Example
    -------
    >>> from ..search.score import Score
    >>> def measure(quants, start=None, give_up_above=None, label=""):
    ...     amax = quants["a"].activation_amax
    ...     return Score(0, 1, abs(amax - 99.9))
    >>> search_layers({"u": ["a"]}, [100, 99.9, 99, 98],
    ...     lambda _, ratio: LayerQuant(8, 8, ratio), measure)[0].cutoff
    99.9
    """
    found = []
    for unit, layers in units.items():
        for layer in layers:
            curve: list[tuple[float, float]] = []
            last: LayerQuant | None = None
            for ratio in sorted(grid, reverse=True):
                quant = quantize(layer, ratio)
                if quant == last:
                    continue
                last = quant
                score = evaluate(
                    {layer: quant},
                    start=unit,
                    label=f"{layer} cut at {ratio:g} %",
                )
                curve.append((ratio, score.loss))
                if score.loss > min(loss for _, loss in curve):
                    break
            # Ties go to the larger percentile.
            cutoff, _ = min(curve, key=lambda row: (row[1], -row[0]))
            found.append(LayerCutoff(layer, cutoff, curve))
    return found
