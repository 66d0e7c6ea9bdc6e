"""Models quantized by OpenVINO's NNCF, for comparison.

The modules that the recipe calls one after the other become an OpenVINO graph
for any length, which NNCF quantizes. While the recipe decodes, the graph
replaces the modules: the first computes it, the others pass its output on.
With accuracy control NNCF reverts the most harmful operations to float, until
the WER of the search set is near enough.
"""

import hashlib
import importlib.util
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..config import QuantizeConfig
from ..methods.search import Score
from ..methods.session import Recognizer
from ..runtimes.base import shadowed_forwards
from ..utils.files import identity
from ..utils.store import Store
from .chain_graph import (
    calibration_waves,
    convert,
    graph_forwards,
    products,
    settings_of,
)

if TYPE_CHECKING:
    import openvino as ov

MODEL_FILE = "model.xml"
RECORD_FILE = "nncf.json"
ANSWERS_FILE = "nncf_answers.json"
PACKAGES = ("openvino", "nncf")

# Maximum number of float operations listed in the report.
NAMES = 8


def require_nncf(method: str) -> None:
    """Raises a ValueError that names the extra to install."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"method: {method} needs package '{package}', which is not "
                "installed; run pip install 'speechbrain_stablequant[nncf]'"
            )


@dataclass(frozen=True)
class Rival:
    """A model that NNCF has quantized, on disk.

    Arguments
    ---------
    key : str
        Identifies all that it was made from.
    folder : Path
        Folder of its files.
    integer, floating : tuple of str
        Names of its matrix products in integer and in float arithmetic.
    search : dict
        Measurements of accuracy control; empty without it.
    chain : Mapping
        The modules that it replaces, in the order of their calls.
    options : Mapping
        Options of ``backend: openvino``: ``threads`` and ``precision``.
    """

    key: str
    folder: Path
    integer: tuple[str, ...]
    floating: tuple[str, ...]
    search: dict
    chain: Mapping[str, nn.Module] = field(repr=False)
    options: Mapping[str, Any]

    @property
    def size(self) -> int:
        """Bytes of its two files."""
        return sum(path.stat().st_size for path in _files(self.folder))

    @property
    def operations(self) -> dict[str, int]:
        """Number of matrix products in integer and in float arithmetic."""
        return {"integer": len(self.integer), "float": len(self.floating)}

    def forwards(self) -> dict[nn.Module, Callable[..., Any]]:
        """Replacements of the modules' forwards, newly compiled."""
        from ..runtimes.openvino_.core import core

        settings = settings_of(**self.options)
        path = self.folder / MODEL_FILE
        compiled = core().compile_model(path, "CPU", settings)
        return graph_forwards(self.chain, compiled)

    def notes(self) -> list[str]:
        """Remarks for the report."""
        count = len(self.integer) + len(self.floating)
        note = f"NNCF quantized {len(self.integer)} of {count} products"
        if self.floating:
            some = ", ".join(self.floating[:NAMES])
            rest = len(self.floating) - NAMES
            more = f" and {rest} more, see {RECORD_FILE}" if rest > 0 else ""
            note += f"; in floating point are {some}{more}"
        notes = [
            f"{note}.",
            "No inference folder: an OpenVINO model of NNCF has no plan.",
        ]
        if self.search and not self.search["reached"]:
            notes.append(
                f"NNCF did not reach a rise of at most "
                f"{self.search['max_drop']:g} points on the search set: "
                f"{self.search['baseline_wer']:.2f} to "
                f"{self.search['final_wer']:.2f} %."
            )
        return notes


class Answers:
    """Measurements of accuracy control on disk, so that a killed run resumes.

    NNCF decides by nothing else: with the same answers it asks the same
    questions, so that their order identifies them.
    """

    def __init__(self, store: Store, key: str):
        self.store = store
        self.key = key
        self.known = store.read(ANSWERS_FILE, key, "NNCF's answers") or []
        self.asked = 0

    def ask(self, only: list[int], measure: Callable[[], Score]) -> Score:
        """The next score: of the utterances ``only``, measured if unknown."""
        known = self.known[self.asked : self.asked + 1]
        if known and known[0]["only"] == only:
            score = Score.from_dict(known[0]["score"])
        else:
            score = measure()
            self.known[self.asked :] = [
                {"only": only, "score": score.to_dict()}
            ]
            self.store.write(ANSWERS_FILE, self.key, self.known)
        self.asked += 1
        return score


def make_rival(
    recognizer: Recognizer,
    chain: Mapping[str, nn.Module],
    wave: torch.Tensor,
    output: torch.Tensor,
    weights: str,
    config: QuantizeConfig,
    store: Store,
) -> Rival:
    """Quantizes by NNCF, or reads the model of an earlier run.

    Arguments
    ---------
    recognizer : Recognizer
        The float model with its calibration and search sets.
    chain : Mapping
        Its modules in the order of their calls.
    wave, output : torch.Tensor
        An input of the first module and the output of the last.
    weights : str
        Fingerprint of the float model.
    config : QuantizeConfig
        The block.
    store : Store
        Of the folder in which the model is written.

    Returns
    -------
    Rival

    Raises
    ------
    ValueError
        A batch of several utterances, or a model that OpenVINO does not
        convert faithfully.
    """
    key = _key(recognizer, weights, config)
    folder = store.folder
    record = _read_record(store, key)
    if record is None:
        started = time.monotonic()
        model = convert(chain, wave, output)
        waves = calibration_waves(recognizer, next(iter(chain.values())))
        if config.method == "nncf":
            model, search = _quantize(model, waves, config), {}
        else:
            answers = Answers(store, key)
            model, search = _control(
                model, waves, recognizer, chain, config, answers
            )
            search["seconds"] = time.monotonic() - started
        # The record marks the files as finished: written last.
        store.delete(RECORD_FILE)
        _write(folder, model, config.float_dtype == "float16")
        integer, floating = products(model)
        record = {
            "integer": integer,
            "floating": floating,
            "search": search,
            "sha256": _checksums(folder),
        }
        store.write(RECORD_FILE, key, record)
    return Rival(
        key=key,
        folder=folder,
        integer=tuple(record["integer"]),
        floating=tuple(record["floating"]),
        search=record["search"],
        chain=dict(chain),
        options=config.backend_options,
    )


# -- record of a finished run ----------------------------------------------


def _files(folder: Path) -> list[Path]:
    path = folder / MODEL_FILE
    return [path, path.with_suffix(".bin")]


def _checksums(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in _files(folder)
    }


def _key(recognizer: Recognizer, weights: str, config: QuantizeConfig) -> str:
    content = [
        weights,
        config.method,
        config.float_dtype,
        recognizer.key("calibration", "inputs"),
        config.nncf.preset,
        [version(package) for package in PACKAGES],
    ]
    if config.needs_search:
        scores = recognizer.key("search", "scores")
        content += [scores, asdict(config.nncf)]
    return identity(content)


def _read_record(store: Store, key: str) -> dict | None:
    record = store.read(RECORD_FILE, key, "NNCF's model")
    if record is None or not all(f.exists() for f in _files(store.folder)):
        return None
    return record if record["sha256"] == _checksums(store.folder) else None


def _write(folder: Path, model: "ov.Model", half: bool) -> None:
    """Writes a model, each of its two files atomically."""
    import openvino as ov

    part = folder / f"part-{MODEL_FILE}"
    ov.save_model(model, part, compress_to_fp16=half)
    for old, new in zip(
        (part, part.with_suffix(".bin")), _files(folder), strict=True
    ):
        old.replace(new)


# -- NNCF ------------------------------------------------------------------


def _common(waves: list[np.ndarray], config: QuantizeConfig) -> dict[str, Any]:
    import nncf

    return {
        "preset": nncf.QuantizationPreset(config.nncf.preset),
        "subset_size": len(waves),
        "model_type": nncf.ModelType.TRANSFORMER,
    }


def _quantize(
    model: "ov.Model", waves: list[np.ndarray], config: QuantizeConfig
) -> "ov.Model":
    import nncf

    return nncf.quantize(model, nncf.Dataset(waves), **_common(waves, config))


def _validation(
    recognizer: Recognizer,
    chain: Mapping[str, nn.Module],
    answers: Answers,
    rates: list[float],
) -> Callable[["ov.CompiledModel", Iterable[int]], tuple[float, list[float]]]:
    """NNCF's measure of a model; appends the WER of the whole set to rates."""
    count = len(recognizer.ids("search"))

    def validate(
        compiled: "ov.CompiledModel", items: Iterable[int]
    ) -> tuple[float, list[float]]:
        only = list(items)

        def measure() -> Score:
            with shadowed_forwards(graph_forwards(chain, compiled)):
                return recognizer.score(lambda _: None, None, only)

        score = answers.ask(only, measure)
        if len(only) == count:
            rates.append(score.wer)
        # NNCF maximizes, and divides by the float model's: never 0.
        return 100 - score.wer, [-float(n) for n in score.utterance_errors]

    return validate


def _control(
    model: "ov.Model",
    waves: list[np.ndarray],
    recognizer: Recognizer,
    chain: Mapping[str, nn.Module],
    config: QuantizeConfig,
    answers: Answers,
) -> tuple["ov.Model", dict]:
    """The model of NNCF with accuracy control, and its measurements."""
    import nncf

    count = len(recognizer.ids("search"))
    rates: list[float] = []
    validate = _validation(recognizer, chain, answers, rates)
    part = config.nncf
    quantized = nncf.quantize_with_accuracy_control(
        model,
        nncf.Dataset(waves),
        nncf.Dataset(range(count)),
        validate,
        max_drop=part.max_drop,
        drop_type=nncf.DropType.ABSOLUTE,
        advanced_accuracy_restorer_parameters=(
            nncf.AdvancedAccuracyRestorerParameters(
                ranking_subset_size=part.ranking_utterances or count,
                # The result must not depend on the machine.
                num_ranking_workers=1,
            )
        ),
        **_common(waves, config),
    )
    from ..runtimes.openvino_.core import core

    settings = settings_of(precision="f32")
    compiled = core().compile_model(quantized, "CPU", settings)
    validate(compiled, range(count))
    # NNCF measures the float model first.
    baseline, final = rates[0], rates[-1]
    return quantized, {
        "num_utterances": count,
        "metric": config.search.metric,
        "max_drop": part.max_drop,
        "evaluations": len(rates),
        "baseline_wer": baseline,
        "final_wer": final,
        # Tolerates rounding of an exact drop.
        "reached": final - baseline <= part.max_drop + 1e-9,
    }
