"""Compares a recipe's transcripts with those of its folder before a search.

The folder is rebuilt in memory with float weights.
"""

import logging
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import speechbrain as sb
import speechbrain.inference.ASR as interfaces
import torch
from torch import nn

from ..config import CommonConfig
from ..folder.errors import NoFolderError
from ..folder.live_modules import encode, probed
from ..folder.module_state import hidden_state, set_hidden_state
from ..folder.tokenizer_file import read_tokenizer
from ..folder.write import ModulesSource, made_objects
from ..runtimes.probe import Compute
from ..utils.patching import shadowed_forwards
from ..utils.typed import short
from .data import audio_of
from .decoding import SPACE, as_scored, same_text
from .generated import generated_source, named_modules
from .inference_yaml import given_source
from .metrics import Row, rows_of
from .passes import evaluation_steps
from .recipe_chain import observing

logger = logging.getLogger(__name__)

# Relative distance of outputs that differ by rounding alone.
_CLOSE = 1e-3


def describe_modules(
    brain: sb.Brain, batch: Any, config: CommonConfig, names: Iterable[str]
) -> tuple[ModulesSource, dict[str, nn.Module]]:
    """Describe a Brain's recognizer by an inference YAML, and the modules that
    fill it; ``names``: its quantized layers.

    Raises a NoFolderError that says what cannot be described, or which
    utterance of the batch is recognized differently.
    """
    audio = audio_of(batch, config.signal)
    with observing(named_modules(brain), audio) as seen:
        attribute = config.metric_attribute
        ((_, metric, _),) = evaluation_steps(
            brain, [batch], sb.Stage.TEST, attribute
        )
    rows = rows_of(metric)
    if config.inference is not None:
        source, modules = given_source(brain, config, names, rows)
    else:
        source, modules = generated_source(brain, config, names, seen, rows)
    texts, encoded = rebuilt(source, modules, audio, brain.device)
    check_texts(rows, texts, source.interface)
    distance = _distance(encoded, seen.decoded)
    if distance > _CLOSE:
        said = (
            "the encoder's output of the rebuilt folder is off by "
            f"{100 * distance:.2g} % from the recipe's"
        )
        if config.inference is None:
            raise NoFolderError(f"{said}; give quantize.inference")
        logger.warning("quantize.inference: %s", said)
    return source, modules


def check_texts(
    rows: Sequence[Row], texts: Sequence[str], interface: str
) -> None:
    """Raise NoFolderError unless a batch's transcripts are the recipe's."""
    tokens = {t for row in rows for t in (*row.reference, *row.hypothesis)}
    if all(len(t) == 1 and t not in (SPACE, " ") for t in tokens):
        # Characters that were counted without the spaces between words.
        texts = [text.replace(" ", "") for text in texts]
    found = [(text,) for text in texts]
    if same_text(rows, found):
        return
    heard = [" ".join(row.hypothesis) for row in rows]
    pairs = zip(rows, heard, as_scored(rows, found), strict=True)
    said = [x for x in pairs if " ".join(x[1].split()) != x[2]]
    row, one, two = (said or [(rows[0], heard[0], texts[0])])[0]
    raise NoFolderError(
        f"utterance {row.id} is {short(one)} in the recipe, and {short(two)} "
        f"with its modules in {interface}"
    )


def _distance(one: torch.Tensor, two: torch.Tensor | None) -> float:
    """Relative distance of two outputs; logits and log probabilities are the
    same."""
    if two is None:
        return 0.0
    if one.shape != two.shape:
        return math.inf
    pairs = [(one.float(), two.float())]
    pairs.append(tuple(x.log_softmax(-1) for x in pairs[0]))
    return min(float((a - b).norm() / b.norm()) for a, b in pairs)


def _made(source: ModulesSource) -> dict[str, Any]:
    """A folder's objects, without the content of its weights."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in source.files.items():
            (Path(folder) / name).write_bytes(content)
        hparams = made_objects(source, Path(folder))
        if source.tokenizer_file is not None:
            path = Path(folder) / source.tokenizer_file
            read_tokenizer(hparams["pretrainer"].tokenizer, path)
    return hparams


def rebuilt(
    source: ModulesSource,
    modules: Mapping[str, nn.Module],
    audio: tuple[torch.Tensor, torch.Tensor],
    device: str | torch.device,
) -> tuple[list[str], torch.Tensor]:
    """What SpeechBrain's class hears with a folder that holds these modules,
    and the encoder's output; tensors of the modules are shared, not copied."""
    hparams = _made(source)
    loader = hparams["pretrainer"]
    for name, module in loader.named_modules().items():
        module.load_state_dict(modules[name].state_dict(), assign=True)
        state = hidden_state({name: modules[name]})
        set_hidden_state({name: module}, state, name)
    kind = getattr(interfaces, source.interface)
    asr = kind(
        modules=hparams["modules"],
        hparams=hparams,
        run_opts={"device": str(device)},
    )
    words, _ = asr.transcribe_batch(*audio)
    with torch.no_grad():
        encoded = encode(loader.encoder, *(x.to(device) for x in audio))
    # WhisperASR gives words where it normalizes.
    texts = [x if isinstance(x, str) else " ".join(x) for x in words]
    return texts, encoded


def live_network(
    source: ModulesSource,
    modules: Mapping[str, nn.Module],
    forwards: Mapping[nn.Module, Callable[..., Any]],
) -> Compute:
    """A runtime's computation of a folder's encoder with the recipe's modules,
    for its probe."""
    loader = _made(source)["pretrainer"]
    made = loader.named_modules()
    live = {id(module): modules[name] for name, module in made.items()}
    parts = []
    for part in loader.encoder:
        for parent in list(part.modules()):
            for name, child in parent.named_children():
                parent._modules[name] = live.get(id(child), child)
        parts.append(live.get(id(part), part).eval())

    def compute(
        wavs: torch.Tensor, relative: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        placed = [part.to(wavs.device) for part in parts]
        with shadowed_forwards(forwards):
            return probed(placed, wavs, relative)

    return compute
