"""Passes over the calibration set, cached on disk."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from ...core.histogram import Histogram
from ...model.layers import Layer
from ...simulation.observers import Observer
from ...utils.distributed import from_main, share
from ...utils.files import identity
from ...utils.store import Store
from ...utils.typed import typed
from .session import Session

HISTOGRAM_FILE = "histograms.json"
#: What error messages call such a file.
WHAT = "calibration histograms"


@dataclass(frozen=True)
class Calibration:
    """Result of a pass over the calibration set.

    ``histograms``: of |input|, by layer name. ``in_order``: whether layers were
    first called in the order of their units.
    """

    histograms: dict[str, Histogram]
    in_order: bool


def calibrate(session: Session, weights: str) -> Calibration:
    """Histograms of all layers from one pass, cached on disk."""
    wanted = {HISTOGRAM_FILE: (session.layers, Observer)}
    (found,) = calibrations(session, weights, wanted)
    return found


def calibrations(
    session: Session,
    weights: str,
    wanted: Mapping[str, tuple[Sequence[Layer], type[Observer]]],
) -> list[Calibration]:
    """Several kinds of histograms from one pass, cached on disk.

    Arguments
    ---------
    session : Session
        The recognizer and its layers.
    weights : str
        Fingerprint of the float model.
    wanted : Mapping
        By cache file: the layers to observe and the observer's class.

    Returns
    -------
    list of Calibration
        In the order of ``wanted``.
    """
    data = session.recognizer.key("calibration", "inputs")
    part = session.config.calibration
    keys = {
        file: identity(
            [
                weights,
                data,
                part.num_bins,
                [layer.name for layer in layers],
            ]
        )
        for file, (layers, _) in wanted.items()
    }
    known = {
        file: from_main(
            _read(
                session.store,
                file,
                key,
                [layer.name for layer in wanted[file][0]],
                part.num_bins,
            )
        )
        for file, key in keys.items()
    }
    missing = {
        file: observe(layers, session.geometry(), part.num_bins)
        for file, (layers, observe) in wanted.items()
        if known[file] is None
    }
    if missing:
        _observe(session, list(missing.values()))
    for file, observer in missing.items():
        known[file] = _calibration(session, wanted[file][0], observer)
        _write(session.store, file, keys[file], known[file])
    return [known[file] for file in wanted]


def _observe(session: Session, observers: Sequence[Observer]) -> None:
    recognizer = session.recognizer
    ids = recognizer.ids("calibration")
    size = session.config.calibration.batch_size
    batches = -(-len(ids) // size)
    bar = session.bar(len(share(batches)), "calibration")

    def before_batch(index: int) -> None:
        lengths = recognizer.lengths("calibration", index)
        for observer in observers:
            observer.start_batch(*lengths)
        bar.update(1)

    with bar, ExitStack() as stack:
        for observer in observers:
            stack.enter_context(observer.watch())
        recognizer.forward("calibration", before_batch)
    for observer in observers:
        observer.join()


def _calibration(
    session: Session, layers: Sequence[Layer], observer: Observer
) -> Calibration:
    observer.check_all_called()
    called = [session.unit_index(name) for name in observer.call_order]
    return Calibration(
        {layer.name: observer.histograms[layer.name] for layer in layers},
        called == sorted(called),
    )


def _write(store: Store, file: str, key: str, calibration: Calibration) -> None:
    store.write(
        file,
        key,
        {
            "in_order": calibration.in_order,
            "layers": {
                name: histogram.to_dict()
                for name, histogram in calibration.histograms.items()
            },
        },
    )


def _read(
    store: Store, file: str, key: str, names: Sequence[str], num_bins: int
) -> Calibration | None:
    return store.read(file, key, WHAT, lambda raw: _parse(raw, names, num_bins))


def _parse(raw: Any, names: Sequence[str], num_bins: int) -> Calibration:
    rows = typed(raw, dict, "content")
    layers = typed(rows.get("layers"), dict, "layers")
    if set(layers) != set(names):
        raise ValueError("it has other layers")
    histograms = {}
    for name in names:
        state = layers[name]
        if typed(state, dict, name).get("num_bins") != num_bins:
            raise ValueError(f"{name}: does not have {num_bins} bins")
        histograms[name] = Histogram.from_dict(state)
    return Calibration(
        histograms, typed(rows.get("in_order"), bool, "in_order")
    )
