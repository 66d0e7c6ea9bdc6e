"""Compares a recipe's transcripts with those of its folder before a search.

The folder is rebuilt in memory with float weights.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import speechbrain as sb
import speechbrain.inference.ASR as interfaces
import torch
from hyperpyyaml import load_hyperpyyaml
from torch import nn

from ..folder.module_state import hidden_state, set_hidden_state
from ..folder.tokenizer_file import read_tokenizer
from ..folder.write_modules import ModulesSource
from ..utils.typed import short
from .data import audio_of
from .decoding import as_scored, same_text
from .errors import NoFolderError
from .metrics import rows_of
from .passes import evaluation_steps

if TYPE_CHECKING:
    from ..methods.registry import QuantizeConfig


def check_rebuilt(
    brain: sb.Brain,
    batch: Any,
    config: "QuantizeConfig",
    source: ModulesSource,
    modules: Mapping[str, nn.Module],
) -> None:
    """Raise NoFolderError unless a batch's transcripts are the recipe's in the
    TEST stage."""
    attribute = config.metric_attribute
    ((_, metric, _),) = evaluation_steps(
        brain, [batch], sb.Stage.TEST, attribute
    )
    rows = rows_of(metric)
    audio = audio_of(batch, config.signal)
    texts = rebuilt_transcripts(source, modules, audio, brain.device)
    found = [(text,) for text in texts]
    if same_text(rows, found):
        return
    heard = [" ".join(row.hypothesis) for row in rows]
    pairs = zip(rows, heard, as_scored(rows, found), strict=True)
    said = [x for x in pairs if " ".join(x[1].split()) != x[2]]
    row, one, two = (said or [(rows[0], heard[0], texts[0])])[0]
    raise NoFolderError(
        f"utterance {row.id} is {short(one)} in the recipe, and {short(two)} "
        f"with its modules in {source.interface}"
    )


def rebuilt_transcripts(
    source: ModulesSource,
    modules: Mapping[str, nn.Module],
    audio: tuple[torch.Tensor, torch.Tensor],
    device: torch.device,
) -> list[str]:
    """What SpeechBrain's class hears with a folder that holds these modules;
    their tensors are shared, not copied."""
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        for name, content in source.files.items():
            (Path(folder) / name).write_bytes(content)
        hparams = load_hyperpyyaml(source.hyperparams(None))
        loader = hparams["pretrainer"]
        for module in loader.late:
            module.build(Path(folder))
        for name, module in loader.named_modules().items():
            module.load_state_dict(modules[name].state_dict(), assign=True)
            state = hidden_state({name: modules[name]})
            set_hidden_state({name: module}, state, name)
        if source.tokenizer_file is not None:
            path = Path(folder) / source.tokenizer_file
            read_tokenizer(loader.tokenizer, path)
        kind = getattr(interfaces, source.interface)
        asr = kind(
            modules=hparams["modules"],
            hparams=hparams,
            run_opts={"device": str(device)},
        )
        words, _ = asr.transcribe_batch(*audio)
    return [str(text) for text in words]
