"""Compares descriptions of encoders with what the encoders compute.

Integer runtimes compute an encoder from its description. Before long work the
description is computed in float, on one batch.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import speechbrain as sb
import torch

from ..core.encoder_spec import describe_encoder
from ..model.layers import Encoder, find_encoders
from ..runtimes.base import encoder_forward, in_own_precision, shadowed_forwards
from ..runtimes.reference import ReferenceExecutor
from ..utils.precision import plain_float32
from ..utils.typed import one_line
from .chain import Call, observe
from .passes import recognize

if TYPE_CHECKING:
    from ..methods.registry import QuantizeConfig

#: Relative to the largest value: far above float rounding, far below the
#: effect of another activation or norm.
TOLERANCE = 1e-3


def check_descriptions(
    brain: sb.Brain, batch: Any, config: "QuantizeConfig"
) -> None:
    """Raise unless the descriptions of encoders compute what they do."""
    modules = dict(brain.modules.items())
    encoders = find_encoders({key: modules[key] for key in config.target})
    if not encoders:
        return
    try:
        calls = observe(brain, batch, {e.path: e.model for e in encoders})
    except Exception as error:
        raise ValueError(
            "the recipe cannot recognize a batch in its VALID stage "
            f"({one_line(error)})"
        ) from error
    first = {call.key: call for call in reversed(calls)}
    forwards = {}
    for encoder in encoders:
        spec = describe_encoder(encoder.model, encoder.path, {})
        execute = in_own_precision(encoder_forward(ReferenceExecutor(spec)))
        if encoder.path in first:
            _check_same(encoder, first[encoder.path], execute)
        forwards[encoder.model] = execute
    # The recipe may use more of an encoder's output than its last state.
    with shadowed_forwards(forwards):
        try:
            recognize(brain, batch)
        except Exception as error:
            raise ValueError(
                f"{encoders[0].path}: what the recipe computes from the last "
                f"hidden state fails ({one_line(error)})"
            ) from error


@torch.no_grad()
def _check_same(encoder: Encoder, call: Call, execute: Callable) -> None:
    """Compare a model with its description, on one utterance."""
    args, kwargs = _longest(call)
    wavs, *_ = *args, *kwargs.values()
    with plain_float32(wavs):
        expected = encoder.model(*args, **kwargs).last_hidden_state
        found = execute(*args, **kwargs).last_hidden_state
    if expected.shape != found.shape:
        off, size = "its shape", tuple(expected.shape)
    else:
        difference = float((expected.float() - found).abs().max())
        largest = float(expected.abs().max())
        # False for NaN, too.
        if difference <= TOLERANCE * largest:
            return
        off, size = f"{difference:.2g}", f"{largest:.2g}"
    raise ValueError(
        f"{encoder.path}: computes something other than its layers in the "
        f"order of wav2vec 2.0 or HuBERT (difference {off} of {size}), which "
        "is not supported by the integer runtimes; use backend: torch"
    )


def _longest(call: Call) -> tuple[tuple, dict[str, Any]]:
    """Arguments of the longest utterance alone: padding is not compared."""
    wavs, *others = (x for x in call.inputs if isinstance(x, torch.Tensor))
    masks = [m for m in others if m.shape == wavs.shape]
    index = int(masks[0].long().sum(1).argmax()) if masks else 0

    def one(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and len(value) == len(wavs):
            return value[index : index + 1]
        return value

    kwargs = {name: one(value) for name, value in call.kwargs.items()}
    return tuple(map(one, call.args)), kwargs
