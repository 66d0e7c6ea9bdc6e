"""Passes over the calibration set, cached on disk."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from ...model.layer import Layer
from ...simulation.observers import Observer, ResidualPeak
from ...utils.distributed import from_main
from ...utils.files import identity
from .histograms import HISTOGRAM_FILE, WHAT, Calibration
from .session import Session


def calibrate(session: Session, weights: str) -> Calibration:
    wanted = {HISTOGRAM_FILE: (session.layers, Observer)}
    (found,) = calibrations(session, weights, wanted)
    return found


def calibrations(
    session: Session,
    weights: str,
    wanted: Mapping[str, tuple[Sequence[Layer], type[Observer]]],
) -> list[Calibration]:
    """Several kinds of histograms from one pass, cached on disk.

    ``weights``: fingerprint of the float model; ``wanted``: layers and class of
    their observer by cache file.
    """
    data = session.recognizer.key("calibration", "inputs")
    num_bins = session.config.calibration.num_bins
    keys: dict[str, str] = {}
    known: dict[str, Calibration | None] = {}
    missing: dict[str, Observer] = {}
    for file, (layers, kind) in wanted.items():
        names = [layer.name for layer in layers]
        keys[file] = identity([weights, data, num_bins, names])
        parse = partial(Calibration.from_dict, names=names, num_bins=num_bins)
        found = session.store.read(file, keys[file], WHAT, parse)
        known[file] = from_main(found)
        if known[file] is None:
            missing[file] = kind(layers, session.geometry(), num_bins)
    peak = ResidualPeak(x.model.encoder for x in session.encoders)
    if missing:
        _observe(session, list(missing.values()), peak)
    unit_of = {layer.name: layer.unit for layer in session.layers}
    order = list(session.units)
    for file, observer in missing.items():
        called = [order.index(unit_of[name]) for name in observer.call_order]
        in_order = called == sorted(called)
        known[file] = Calibration(observer.histograms, in_order, peak.value)
        session.store.write(file, keys[file], known[file].to_dict())
    return [known[file] for file in wanted]


def _observe(
    session: Session, observers: Sequence[Observer], peak: ResidualPeak
) -> None:
    recognizer = session.recognizer
    bar = session.bar(session.batches("calibration"), "calibration")

    def before_batch(index: int) -> None:
        lengths = recognizer.lengths("calibration", index)
        for observer in observers:
            observer.start_batch(*lengths)
        bar.update(1)

    with bar, ExitStack() as stack:
        for observer in (*observers, peak):
            stack.enter_context(observer.watch())
        recognizer.forward("calibration", before_batch)
    peak.join()
    for observer in observers:
        observer.join()
        observer.check_all_called()
