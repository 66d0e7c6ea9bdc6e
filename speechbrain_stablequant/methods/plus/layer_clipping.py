"""A cut-off for each layer, by the divergence that it alone causes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...core.plan import LayerQuant
from ..search.score import Evaluate


@dataclass(frozen=True)
class LayerCutoff:
    """The cut-off of one layer, and how it was found.

    Arguments
    ---------
    layer : str
        Its name.
    cutoff : float
        The chosen ratio in percent.
    curve : list of (float, float)
        Ratios that were tried, and the divergence of each.
    """

    layer: str
    cutoff: float
    curve: list[tuple[float, float]]


def search_layers(
    units: Mapping[str, Sequence[str]],
    grid: Sequence[float],
    quantize: Callable[[str, float], LayerQuant],
    evaluate: Evaluate,
) -> list[LayerCutoff]:
    """Searches the cut-off of each layer, everything else float.

    The ratios are tried from the largest on, until one is worse than the
    best: a range that cuts too much only gets worse from there.

    Arguments
    ---------
    units : Mapping
        Names of layers by unit.
    grid : sequence of float
        Ratios in percent to try.
    quantize : callable
        Of a layer and a ratio. Ratios that give the same are tried once.
    evaluate : Evaluate
        Measures the divergence, as its score's loss.

    Returns
    -------
    list of LayerCutoff

    Example
    -------
    >>> from .score import Score
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
            # Ties go to the larger ratio.
            cutoff, _ = min(curve, key=lambda row: (row[1], -row[0]))
            found.append(LayerCutoff(layer, cutoff, curve))
    return found
