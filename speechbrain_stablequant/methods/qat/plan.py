"""``method: qat``: trains the calibrated model on the quantization grid."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from ...core.layer_quant import LayerQuant, quants_json
from ...core.plan import QuantizationPlan
from ...core.plan_tensors import AdjustedTensors, adjusted_floats
from ...simulation.fake_quant import Simulator
from ...utils.files import identity
from ..calibrator import calibrator_plan
from ..search.score import Score
from ..session.histograms import Calibration
from ..session.session import Planned, Session, share_beyond
from .loop import EpochStore, kept, train
from .student import Student

EPOCH_FOLDER = "finished_epochs"


def qat_plan(
    session: Session, weights: str, calibration: Calibration
) -> Planned:
    """Trains a calibrated model; ``search["training"]`` has all epochs."""
    settings, recognizer = session.config.qat, session.recognizer
    start, histograms = calibrator_plan(
        session, weights, calibration, settings.calibrator, ", then training"
    )
    batches = len(recognizer.trainer)
    bar = session.bar(settings.epochs * batches, "qat", smoothing=0)

    def on_batch(epoch: int, index: int) -> None:
        done = (epoch - 1) * batches + index
        if bar.n == 0:
            # Epochs of an earlier run would distort the remaining time.
            bar.n = bar.initial = done
        bar.set_postfix_str(f"epoch {epoch}", refresh=False)
        bar.update(done - bar.n)

    def score(*decided: Any) -> Score:
        bar.set_postfix_str("scoring the search set")
        return _score(session, *decided)

    with bar:
        quants, tensors, history = train(
            settings,
            _student(session, start),
            recognizer.trainer,
            score,
            EpochStore(session.store.below(EPOCH_FOLDER), _key(session, start)),
            on_batch,
        )
        bar.update(bar.total - bar.n)
    layers = [
        replace(
            x,
            quant=quants[x.name],
            beyond=share_beyond(quants[x.name], histograms[x.name]),
        )
        for x in start.layers
    ]
    best = kept(settings, history)
    search = {
        "metric": recognizer.rate,
        "final_wer": best["wer"],
        "epoch": best["epoch"],
        "training": history,
    }
    if settings.keep == "best":
        search["num_utterances"] = len(recognizer.ids("search"))
        search["evaluations"] = len(history)
    plan = replace(start, layers=layers, search=search, tensors=tensors)
    return plan, histograms


def _student(session: Session, start: QuantizationPlan) -> Student:
    settings, modules = session.config.qat, session.recognizer.modules
    encoders = session.encoders if settings.freeze_feature_extractor else ()
    frozen = tuple(f"{x.path}.feature_extractor." for x in encoders)
    return Student(
        session.layers,
        start.quants(),
        {key: modules[key] for key in session.config.target},
        settings.learn_scales,
        lambda name: name.startswith(frozen),
        settings.bfloat16,
    )


def _score(
    session: Session, quants: Mapping[str, LayerQuant], tensors: AdjustedTensors
) -> Score:
    simulator = Simulator(session.layers, tensors.layers)
    with (
        simulator.apply(quants),
        adjusted_floats(session.recognizer.modules, tensors.floats),
    ):
        return session.recognizer.score(lambda _: None, None)


def _key(session: Session, start: QuantizationPlan) -> str:
    config, recognizer = session.config, session.recognizer
    content = [
        start.fingerprint,
        quants_json(start.quants()),
        asdict(config.qat),
        config.seed,
        recognizer.training_key(session.store),
    ]
    if config.qat.keep == "best":
        content.append(recognizer.key("search", "scores"))
    return identity(content)
