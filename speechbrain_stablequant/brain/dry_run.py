"""Runs a batch before long work: encoder descriptions and decoding.

Integer runtimes compute an encoder from its description. The description is
computed in float and compared with the modules' own output.
"""

import copy
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import speechbrain as sb
import torch
from torch import nn

from ..config import QuantizeConfig
from ..core.encoder_spec import describe_encoder
from ..model.layers import Encoder, find_encoders
from ..runtimes.base import encoder_forward, in_own_precision, shadowed_forwards
from ..runtimes.reference import ReferenceExecutor
from ..utils.precision import plain_float32
from ..utils.typed import one_line
from .decoding import FolderDecoder
from .recognizer import evaluation_steps

#: Relative to the largest value: far above float rounding, far below the
#: effect of another activation or norm.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class _ModelCall:
    """Arguments of a model's call."""

    args: tuple
    kwargs: dict[str, Any]


def check_descriptions(
    brain: sb.Brain, batch: Any, config: QuantizeConfig
) -> None:
    """Raise unless the descriptions of encoders compute what they do."""
    modules = dict(brain.modules.items())
    encoders = find_encoders({key: modules[key] for key in config.target})
    if not encoders:
        return
    try:
        calls = _calls(brain, batch, encoders)
    except Exception as error:
        raise ValueError(
            "the recipe cannot recognize a batch in its VALID stage "
            f"({one_line(error)})"
        ) from error
    forwards = {}
    for encoder in encoders:
        spec = describe_encoder(encoder.model, encoder.path, {})
        execute = in_own_precision(encoder_forward(ReferenceExecutor(spec)))
        if encoder.path in calls:
            _check_same(encoder, calls[encoder.path], execute)
        forwards[encoder.model] = execute
    # The recipe may use more of an encoder's output than its last state.
    with shadowed_forwards(forwards):
        try:
            _compute(brain, batch)
        except Exception as error:
            raise ValueError(
                f"{encoders[0].path}: what the recipe computes from the last "
                f"hidden state fails ({one_line(error)})"
            ) from error


@torch.no_grad()
def _compute(brain: sb.Brain, batch: Any) -> None:
    brain.modules.eval()
    with brain.evaluation_ctx:
        brain.compute_forward(copy.copy(batch), stage=sb.Stage.VALID)


def _calls(
    brain: sb.Brain, batch: Any, encoders: Iterable[Encoder]
) -> dict[str, _ModelCall]:
    """The first call of each encoder's model, by path."""
    calls: dict[str, _ModelCall] = {}

    def hook(path: str):
        def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
            calls.setdefault(path, _ModelCall(args, kwargs))

        return record

    with ExitStack() as stack:
        for encoder in encoders:
            handle = encoder.model.register_forward_pre_hook(
                hook(encoder.path), with_kwargs=True
            )
            stack.callback(handle.remove)
        _compute(brain, batch)
    return calls


@torch.no_grad()
def _check_same(encoder: Encoder, call: _ModelCall, execute: Any) -> None:
    """Compare a model with its description, on one utterance."""
    args, kwargs = _longest(call)
    wavs, *_ = *args, *kwargs.values()
    with plain_float32(wavs):
        expected = encoder.model(*args, **kwargs).last_hidden_state
        found = execute(*args, **kwargs).last_hidden_state
    if expected.shape != found.shape:
        off, size = "its shape", tuple(expected.shape)
    else:
        off = float((expected.float() - found).abs().max())
        size = float(expected.abs().max())
        # False for NaN, too.
        if off <= TOLERANCE * size:
            return
        off = f"{off:.2g}"
        size = f"{size:.2g}"
    raise ValueError(
        f"{encoder.path}: computes something other than its layers in the "
        f"order of wav2vec 2.0 or HuBERT (difference {off} of {size}), which "
        "is not supported by the integer runtimes; use backend: torch"
    )


def _longest(call: _ModelCall) -> tuple[tuple, dict[str, Any]]:
    """A call with only the longest utterance: padding is not compared."""
    tensors = [
        value
        for value in (*call.args, *call.kwargs.values())
        if isinstance(value, torch.Tensor)
    ]
    wavs, *others = tensors
    masks = [m for m in others if m.shape == wavs.shape]
    index = int(masks[0].long().sum(1).argmax()) if masks else 0

    def one(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and len(value) == len(wavs):
            return value[index : index + 1]
        return value

    return (
        tuple(map(one, call.args)),
        {name: one(value) for name, value in call.kwargs.items()},
    )


def transcribe_batch(
    brain: sb.Brain, batch: Any, attribute: str, decoder: FolderDecoder
) -> tuple[Any, list[tuple[str, ...]]]:
    """Evaluate a batch: the Brain's metric, and the folder's transcripts."""
    with decoder.listening(brain) as texts:
        steps = evaluation_steps(brain, [batch], sb.Stage.TEST, attribute)
        (_, metric, _), *_ = steps
    return metric, texts
