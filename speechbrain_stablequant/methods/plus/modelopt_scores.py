"""Scores of modelopt's AutoQuantize, cached on disk."""

from collections.abc import Sequence

from ...model.layers import Layer
from ...utils.files import identity
from ...utils.typed import typed
from ..search.auto_quantize import (
    auto_quantize_scores,
    inputs_of_first,
    modelopt_version,
)
from ..session.session import Session

SCORE_FILE = "auto_quantize.json"


def modelopt_scores(
    session: Session,
    weights: str,
    layers: Sequence[Layer],
    widths: Sequence[int],
) -> dict[str, dict[int, float]]:
    """Scores of layers by bits, from modelopt's AutoQuantize."""
    recognizer, config = session.recognizer, session.config
    names = [layer.name for layer in layers]
    key = identity(
        [
            weights,
            recognizer.key("calibration", "inputs"),
            names,
            list(widths),
            config.activation_bits,
            config.seed,
            modelopt_version(),
        ]
    )
    known = session.store.read(
        SCORE_FILE,
        key,
        "modelopt's scores",
        lambda raw: typed(raw, dict[str, list[float]], "content"),
    )
    if known is None:
        modules = {name: recognizer.modules[name] for name in config.target}
        order, batches = inputs_of_first(
            modules,
            lambda: recognizer.forward("calibration", lambda _: None),
        )
        scores = auto_quantize_scores(
            {name: modules[name] for name in order},
            batches,
            recognizer.forward("calibration", lambda _: None, True),
            layers,
            widths,
            config.activation_bits,
            config.seed,
        )
        known = {
            name: [row[bits] for bits in widths] for name, row in scores.items()
        }
        session.store.write(SCORE_FILE, key, known)
    return {
        name: dict(zip(widths, row, strict=True)) for name, row in known.items()
    }
