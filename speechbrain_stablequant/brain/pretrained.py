"""Quantizes a pretrained recognizer without a recipe.

A folder of the Hub is loaded in SpeechBrain's class and wrapped in a Brain that
transcribes as the class does; its data come from a manifest. From there on all
is as with a recipe's Brain.
"""

import logging
import random
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ruamel.yaml
import torch
from speechbrain.dataio.dataset import DynamicItemDataset

from ..config import ConfigError
from ..folder.card import Origin
from ..folder.recognizer_spec import HYPERPARAMS_FILE
from ..folder.weights_file import MODEL_FOLDER
from ..methods.registry import QuantizeConfig
from ..utils.typed import one_line
from .attach import StableQuant
from .block import read_block
from .manifest import Manifest, ManifestError, Rows, named, read_manifest
from .pretrained_brain import PretrainedBrain, Recognizer
from .run import Run
from .source import allowed, check_source, load_source, resolved, source_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizedSource:
    """What :func:`quantize_pretrained` made.

    Arguments
    ---------
    folder : Path
        Holds the inference folder (``model``), plan, report and journal.
    report : Path
        ``report.json`` in it; ``report.html`` and others lie beside it.
    float_wer, quantized_wer : float
        Word error rates of the evaluated part in percent.
    """

    folder: Path
    report: Path
    float_wer: float
    quantized_wer: float

    @property
    def model(self) -> Path:
        """The inference folder, ready to be uploaded."""
        return self.folder / MODEL_FOLDER


def quantize_pretrained(
    source: str | Path,
    manifest: Manifest,
    output: str | Path,
    *,
    test_manifest: Manifest | None = None,
    data_root: str | Path | None = None,
    normalize: Callable[[str], str] | None = None,
    trust_source: bool = False,
    run_opts: Mapping[str, Any] | None = None,
    **block: Any,
) -> "QuantizedSource | dict[str, QuantizedSource]":
    """Quantize a pretrained recognizer, given some audio.

    The protocol is that of a recipe with a ``quantize:`` block: calibration
    and search on one part of the utterances, and the evaluation of the float
    and of the quantized model on another.

    Arguments
    ---------
    source : str or Path
        Id of a model on the HuggingFace Hub, or a folder in its layout:
        ``hyperparams.yaml`` for SpeechBrain's EncoderASR, EncoderDecoderASR
        or WhisperASR.
    manifest : str, Path or list
        Audio with transcripts: SpeechBrain's CSV or JSON (``ID``, ``wav``,
        ``wrd``) or a folder in LibriSpeech's layout. Or audio alone, a folder
        or a list of files, for methods that need no transcripts; then the
        float model's transcripts are the references.
    output : str or Path
        Folder to write to.
    test_manifest : str, Path or list, optional
        Utterances to evaluate; without it, half of ``manifest`` drawn by
        ``seed``, which is then not used for the calibration and the search.
    data_root : str or Path, optional
        What ``$data_root`` and ``{data_root}`` stand for in manifests, and
        what their paths are relative to; the folder of each by default.
    normalize : callable, optional
        Applied to each reference, to write it as the recognizer does: such as
        ``str.upper``. Words are compared as they are recognized; a WhisperASR
        with ``normalized_transcripts`` normalizes both.
    trust_source : bool
        Whether the source may execute code: tags of its YAML that are no
        parts of models, a ``custom.py``, checkpoints with pickled objects.
    run_opts : dict, optional
        Options of SpeechBrain's Brain, such as ``{"device": "cuda"}``.
    **block
        Keys of :class:`~speechbrain_stablequant.QuantizeConfig`.

    Returns
    -------
    QuantizedSource
        With ``variants`` in the block, a dictionary of them by name.

    Raises
    ------
    ValueError
        One line that names the key, the file or the utterance.

    Example
    -------
    >>> quantize_pretrained("some/model", ["a.wav", "b.wav"], "out")
    Traceback (most recent call last):
        ...
    speechbrain_stablequant.brain.manifest.ManifestError: utterance a: there \
is no file a.wav
    """
    if "output_folder" in block:
        raise ConfigError(
            "quantize.output_folder: is the argument `output` here; leave it "
            "out"
        )
    config = read_block(block)
    _check_device((run_opts or {}).get("device", "cpu"))
    decision, test, told = _read_data(
        manifest, test_manifest, data_root, config.seed
    )
    _check_methods(config, told)
    folder = source_folder(source)
    kind = check_source(folder, trust_source)
    with allowed(folder, trust_source), tempfile.TemporaryDirectory() as place:
        loaded = load_source(folder, kind, run_opts or {})
        recognizer = Recognizer(loaded, normalize)
        _write_nodes(folder, recognizer.chain, Path(place))
        brain = PretrainedBrain(recognizer, run_opts or {})
        brain.hparams.output_folder = place
        if not told:
            decision = {k: {**v, "wrd": ""} for k, v in decision.items()}
        # A chain is described by its modules.
        yaml = None if recognizer.chain else str(folder / HYPERPARAMS_FILE)
        block = {
            "target": recognizer.used,
            "inference": yaml,
            "sample_rate": recognizer.pretrained.audio_normalizer.sample_rate,
            "output_folder": str(output),
            **block,
        }
        quantized = StableQuant.attach(
            brain, valid_set=_dataset(decision, recognizer), **block
        )
        # After the block was checked against the modules.
        if not told:
            test = _transcribed(test, recognizer)
        remarks = _remarks(recognizer, decision, test, told)
        for remark in remarks:
            logger.warning("quantize: %s", remark)
        for run in quantized.runs:
            run.warnings += remarks
            run.origin = Origin.of(source, remarks)
        brain.evaluate(
            _dataset(test, recognizer), test_loader_kwargs={"batch_size": 1}
        )
    made = {run.name: _result(run) for run in quantized.runs}
    return made if quantized.config.variants else made[""]


def _check_device(device: str) -> None:
    """Refuse a device that this machine does not have."""
    try:
        torch.empty(0, device=device)
    # An AssertionError: a torch without CUDA.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {one_line(error, 200)}") from error


def _read_data(
    manifest: Manifest,
    test_manifest: Manifest | None,
    data_root: str | Path | None,
    seed: int,
) -> tuple[Rows, Rows, bool]:
    """Utterances to decide on and to evaluate, and if they are transcribed."""
    rows = read_manifest(manifest, data_root)
    if test_manifest is not None:
        test = read_manifest(test_manifest, data_root)
    elif len(rows) < 2:
        raise ManifestError(
            f"{named(manifest)}: one utterance cannot be divided; add more, "
            "or give test_manifest"
        )
    else:
        drawn = random.Random(seed).sample(sorted(rows), len(rows) // 2)
        test = {name: rows.pop(name) for name in sorted(drawn)}
    told = ["wrd" in next(iter(part.values())) for part in (rows, test)]
    if told[0] != told[1]:
        raise ManifestError(
            f"{named(test_manifest if told[0] else manifest)}: has no "
            "transcripts, and the other manifest has"
        )
    return rows, test, told[0]


def _check_methods(block: QuantizeConfig, told: bool) -> None:
    """Refuse what needs a training set, or transcripts that are not there."""
    for config in block.variant_configs().values():
        if config.needs_training:
            raise ConfigError(
                f"quantize.method: {config.method} trains, and there is no "
                "training set; choose another method, or attach to the "
                "recipe's Brain"
            )
        if config.transcribed and not told:
            raise ConfigError(
                f"quantize.method: {config.method} compares word error rates, "
                "and there are no transcripts; add them, or choose a method "
                "without, such as mse"
            )


def _write_nodes(folder: Path, chain: Iterable[str], place: Path) -> None:
    """Write the YAML nodes of a chain's modules as a recipe has them."""
    if not chain:
        return
    tree = ruamel.yaml.YAML().load(resolved(folder / HYPERPARAMS_FILE))
    nodes = tree["modules"]["encoder"]
    found = {key: nodes[key] for key in chain if key in nodes}
    with open(place / HYPERPARAMS_FILE, "w", encoding="utf-8") as file:
        ruamel.yaml.YAML().dump({"modules": found}, file)


def _dataset(rows: Rows, recognizer: Recognizer) -> DynamicItemDataset:
    """A data set of copies, as the Brain reads it."""
    data = DynamicItemDataset({name: dict(row) for name, row in rows.items()})
    data.add_dynamic_item(recognizer.load_audio, takes="wav", provides="sig")
    data.set_output_keys(["id", "sig", "wrd"])
    return data


def _transcribed(rows: Rows, recognizer: Recognizer) -> Rows:
    """Utterances with what the float model recognizes as references."""
    found: Rows = {}
    for name, row in rows.items():
        wave = recognizer.load_audio(row["wav"])[None]
        with torch.no_grad():
            _, (text,) = recognizer.transcribe(wave, torch.ones(1))
        found[name] = {**row, "wrd": text}
    return found


def _remarks(
    recognizer: Recognizer, decision: Rows, test: Rows, told: bool
) -> list[str]:
    """What readers of the report have to know of data and scoring."""
    found = []
    if not told:
        found.append(
            "There are no transcripts: the references are what the float "
            "model recognizes, and WER is how far the quantized one departs."
        )
    both = {x["wav"] for x in decision.values()}
    both &= {x["wav"] for x in test.values()}
    if both:
        found.append(
            f"{len(both)} of the {len(test)} evaluated utterances also decided "
            "how the model is quantized."
        )
    if recognizer.normalizes:
        found.append(
            "References and transcripts are normalized as WhisperASR does "
            "(normalized_transcripts) before words are compared."
        )
    if not recognizer.has_loss:
        found.append(
            "The loss of this recognizer is not computed: equal word error "
            "rates are not told apart by it."
        )
    return found


def _result(run: Run) -> QuantizedSource:
    (result,) = run.results.values()
    rates = result.to_dict()
    return QuantizedSource(
        run.folder,
        run.folder / "report.json",
        rates["float"]["WER"],
        rates["quantized"]["WER"],
    )
