"""The keys of ``report.json`` and the check that they are there.

::

    {"format": 1, "created": ISO time, "title": str, "method": str,
     "bits": {"weight": 8, "activation": 8}, "backend": "simulated",
     "environment": {"python": "3.11.7", ...},
     "test": {SET: {"float": RATES, "quantized": RATES,
                    "delta_wer": points, "delta_wer_ci": [low, high],
                    "delta_cer": points, "delta_cer_ci": [low, high],
                    "folder": {"float": RATES, "quantized": RATES}}},
     "size_mb": {"float": MB, "quantized": MB, "float_stored_as": str,
                 "quantized_floats": "float16"},
     "rtf": {"float": ratio, "quantized": ratio},
     "search": {"num_utterances", "baseline_wer", "threshold",
                "evaluations", "seconds", "metric"},
     "units": [{"name", "layers", "parameters", "wer", "delta_wer",
                "delta_wer_ci", "selected", "cutoff",
                "curve": [{"cutoff", "wer", "secondary"}]}],
     "histograms": {LAYER: {"unit", "range", "counts", "max",
                            "cutoff_amax", "amax"}},
     "warnings": [str], "files": {"plan": "plan.json"}}

RATES are what ``ErrorRates.to_dict`` gives. Rates and cut-offs are in
percent, differences in points; a number that was not measured is null.
``folder`` stands where the inference folder decodes otherwise than the recipe:
its own rates on the same outputs. May be left out: it, what concerns CER
differences, ``float_stored_as``, ``quantized_floats``, ``search``,
``histograms``, ``warnings``, ``files``, and of a unit all that is not in
``_UNIT``.
"""

from collections.abc import Iterator
from typing import Any

FORMAT = 1

# Dotted keys whose values are numbers or null.
_NUMBERS = ("size_mb.float", "size_mb.quantized", "rtf.float", "rtf.quantized")
_SET = (
    "float.WER",
    "float.CER",
    "float.utterances",
    "quantized.WER",
    "quantized.CER",
    "quantized.utterances",
    "delta_wer",
)
_FOLDER = ("float.WER", "float.CER", "quantized.WER", "quantized.CER")
_UNIT = ("delta_wer", "cutoff")
_UNIT_OPTIONAL = ("wer", "layers", "parameters")
_SEARCH = (
    "num_utterances",
    "baseline_wer",
    "threshold",
    "evaluations",
    "seconds",
)
_HISTOGRAM = ("range", "max", "amax")


def check_report(report: dict) -> None:
    """Raises an error that names the first key that is missing or wrong.

    Arguments
    ---------
    report : dict
        The report.

    Example
    -------
    >>> check_report({"format": 1, "created": "2025-01-01"})
    Traceback (most recent call last):
    ValueError: report: the key 'title' is missing
    """
    _expect(report, dict, "report")
    version = _get(report, "format")
    if version != FORMAT:
        raise ValueError(
            f"report: 'format' is {version!r}, but this version writes {FORMAT}"
        )
    for key in ("created", "title", "method", "backend"):
        _expect(_get(report, key), str, key)
    for key in ("bits.weight", "bits.activation"):
        _get(report, key)
    _expect(_get(report, "environment"), dict, "environment")
    for key in _NUMBERS:
        _number(report, key)
    for name, entry in _expect(_get(report, "test"), dict, "test").items():
        _check_set(entry, f"test.{name}")
    for place, unit in _items(report, "units", required=True):
        _check_unit(unit, place)
    search = report.get("search")
    if search is not None:
        for key in _SEARCH:
            _number(search, key, "search", required=False)
    histograms = report.get("histograms") or {}
    for name, entry in _expect(histograms, dict, "histograms").items():
        _check_histogram(entry, f"histograms.{name}")
    for place, warning in _items(report, "warnings"):
        _expect(warning, str, place)
    _expect(report.get("files") or {}, dict, "files")


def _check_set(entry: Any, place: str) -> None:
    for key in _SET:
        _number(entry, key, place)
    _interval(_get(entry, "delta_wer_ci", place), f"{place}.delta_wer_ci")
    _number(entry, "delta_cer", place, required=False)
    _interval(entry.get("delta_cer_ci"), f"{place}.delta_cer_ci")
    if entry.get("folder") is not None:
        for key in _FOLDER:
            _number(entry["folder"], key, f"{place}.folder")


def _check_unit(unit: Any, place: str) -> None:
    _expect(_get(unit, "name", place), str, f"{place}.name")
    for key in _UNIT:
        _number(unit, key, place)
    for key in _UNIT_OPTIONAL:
        _number(unit, key, place, required=False)
    _interval(unit.get("delta_wer_ci"), f"{place}.delta_wer_ci")
    _expect(_get(unit, "selected", place), bool, f"{place}.selected")
    for point_place, point in _items(unit, "curve", place):
        _number(point, "cutoff", point_place)
        _number(point, "wer", point_place)


def _check_histogram(entry: Any, place: str) -> None:
    for key in _HISTOGRAM:
        _number(entry, key, place)
    _number(entry, "cutoff_amax", place, required=False)
    for count_place, count in _items(entry, "counts", place, required=True):
        _check_number(count, count_place, optional=False)


def _get(container: Any, key: str, place: str = "") -> Any:
    """Follows a dotted key; what is not there is an error that names it."""
    path = place
    for part in key.split("."):
        _expect(container, dict, path or "report")
        path = f"{path}.{part}" if path else part
        if part not in container:
            raise ValueError(f"report: the key '{path}' is missing")
        container = container[part]
    return container


def _number(
    container: Any, key: str, place: str = "", required: bool = True
) -> None:
    """The value at a dotted key must be a number or null."""
    if not required and _expect(container, dict, place).get(key) is None:
        return
    value = _get(container, key, place)
    _check_number(value, f"{place}.{key}" if place else key)


def _check_number(value: Any, place: str, optional: bool = True) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"report: '{place}' must be a number, not {value!r}")


def _interval(value: Any, place: str) -> None:
    if value is None:
        return
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"report: '{place}' must be [low, high]")
    for index, end in enumerate(value):
        _check_number(end, f"{place}[{index}]", optional=False)


def _items(
    container: Any, key: str, place: str = "", required: bool = False
) -> Iterator[tuple[str, Any]]:
    """The entries of a list, each with the place to name in an error."""
    path = f"{place}.{key}" if place else key
    value = _get(container, key, place) if required else container.get(key)
    for index, item in enumerate(_expect(value or [], (list, tuple), path)):
        yield f"{path}[{index}]", item


def _expect(value: Any, kind: type | tuple[type, ...], place: str) -> Any:
    """Returns the value if it is of the kind that the place holds."""
    if not isinstance(value, kind):
        first = kind[0] if isinstance(kind, tuple) else kind
        raise ValueError(
            f"report: '{place}' must be a {first.__name__}, "
            f"not a {type(value).__name__}"
        )
    return value
