"""The model card of a folder: its ``README.md``, with metadata for the Hub."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import (
    EvalResult,
    ModelCard,
    ModelCardData,
    try_to_load_from_cache,
)
from yaml import YAMLError

from ..utils.typed import one_line

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
_TASK = "automatic-speech-recognition"
_ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_INHERITED = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class Origin:
    """What is known of the float model."""

    base_model: str | None = None  #: its id on the Hub, never a path
    #: ``license``, ``language`` and others of its own card.
    metadata: Mapping[str, Any] = field(default_factory=dict)
    remarks: Sequence[str] = ()  #: what readers of the results must know

    @classmethod
    def of(cls, source: str | Path, remarks: Sequence[str] = ()) -> "Origin":
        """Of a folder, or of an id on the Hub as far as it was downloaded."""
        name, card = None, Path(source) / CARD_FILE
        if not Path(source).is_dir():
            if not _ON_THE_HUB.fullmatch(str(source)):
                return cls(remarks=remarks)
            name = str(source)
            card = try_to_load_from_cache(name, CARD_FILE)
        if not isinstance(card, str | Path) or not Path(card).is_file():
            return cls(name, {}, remarks)
        try:
            data = ModelCard.load(card, ignore_metadata_errors=True).data
        except (OSError, ValueError, YAMLError) as error:
            # Of another author, and no reason to end a run.
            reason = one_line(error, 200)
            logger.warning("quantize: %s tells no license: %s", card, reason)
            return cls(name, {}, remarks)
        found = {key: data.get(key) for key in _INHERITED if data.get(key)}
        base = data.get("base_model")
        base = base if isinstance(base, str) else None
        return cls(name or base, found, remarks)


def card_header(
    title: str,
    origin: Origin,
    rate: str,
    tests: Mapping[str, Mapping[str, Any]],
    bits: Mapping[str, int],
) -> str:
    """The card's metadata, in YAML; ``rate``, ``tests`` and ``bits`` as in
    the report."""
    results = [
        EvalResult(
            _TASK,
            dataset_type=test,
            dataset_name=test,
            metric_type=rate.lower(),
            metric_name=f"{rate}, %",
            metric_value=round(entry["quantized"]["WER"], 2),
            metric_args={
                "float_model": round(entry["float"]["WER"], 2),
                "change": round(entry["delta_wer"], 2),
                "change_interval_95": [
                    round(end, 2) for end in entry["delta_wer_ci"]
                ],
            },
        )
        for test, entry in tests.items()
    ]
    precision = f"w{bits['weight']}a{bits['activation']}"
    data = ModelCardData(
        **origin.metadata,
        base_model=origin.base_model,
        model_name=title,
        eval_results=results,
        library_name="speechbrain",
        pipeline_tag=_TASK,
        metrics=[rate.lower()],
        tags=["speechbrain", "stablequant", "quantized", precision],
    )
    return f"---\n{data.to_yaml()}\n---\n\n"
