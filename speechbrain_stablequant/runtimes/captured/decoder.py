"""A decoder as a part of a plan: whether its graphs compute it, its forward."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...core.encoder_spec import AnyLayer
from ...core.integer_layer import IntegerLayer, float_layer
from ...core.parts import Part
from ...model import products
from ...utils.patching import shadowed
from ...utils.typed import one_line
from ..layer_check import heads_with_algorithms
from ..openvino_ import OpenVinoOptions
from ..openvino_.layer_runner import OpenVINORunner
from .calls import Call, CaptureError
from .capture import check_same
from .steps import DecoderExecutor, DecoderForward

#: Steps after a first call: of a trial, and of a timed pass.
_TRIED, _TIMED = 2, 8


def decoder_forward(
    module: nn.Module, layers: Mapping[str, IntegerLayer], **options: Any
) -> DecoderForward:
    """The forward of a decoder; ``layers`` by path inside of it."""
    # Multiplied in integers; the others as floats.
    memory = {
        path: layer
        for path, layer in layers.items()
        if path.endswith(("encoder_attn.k_proj", "encoder_attn.v_proj"))
    }
    found = heads_with_algorithms(memory, OpenVINORunner(**options))
    return _forward(module, {**layers, **found}, **options)


def _forward(
    module: nn.Module, layers: Mapping[str, AnyLayer], **options: Any
) -> DecoderForward:
    executor = DecoderExecutor(module, layers, OpenVinoOptions(**options))
    return DecoderForward(module, executor)


def first_calls(calls: Sequence[Call]) -> tuple[list[Call], int]:
    """The calls that begin a decoding, and how many steps to time after each:
    none if the recipe's searcher keeps no keys and values."""
    names = "past_key_values", "cache"
    begins = [
        all(call.kwargs.get(name) is None for name in names) for call in calls
    ]
    # Others are teacher-forced.
    followed = [
        call
        for i, call in enumerate(calls[:-1])
        if begins[i] and not begins[i + 1]
    ]
    first = followed or [x for x, yes in zip(calls, begins, strict=True) if yes]
    if not first or any(
        call.args or call.kwargs.get("output_attentions") for call in calls
    ):
        raise CaptureError("it is called in another way than by SpeechBrain")
    return first, min(begins.count(False) // len(first), _TIMED)


@torch.no_grad()
def decode(
    module: nn.Module,
    steps: int,
    *,
    input_ids: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    **_: Any,
) -> list[torch.Tensor]:
    """A call and steps after it: the products with the embedding's weight, as
    SpeechBrain computes them. Rows are in reverse order after each."""
    cache, found = None, []
    weight = module.embed_tokens.weight.T
    for _step in range(1 + steps):
        output = module(
            input_ids=input_ids,
            encoder_hidden_states=encoder_hidden_states,
            past_key_values=cache,
            use_cache=True,
        )
        found.append(output.last_hidden_state @ weight)
        cache, input_ids = output.past_key_values, input_ids[:, -1:]
        if len(input_ids) > 1:
            cache.reorder_cache(torch.arange(len(input_ids)).flip(0))
    return found


def decoder_part(
    name: str, module: nn.Module, calls: Sequence[Call], sites: Sequence[str]
) -> Part:
    """The part of a decoder whose graphs compute what it does; a
    :class:`CaptureError` tells why there is none. Arguments as of
    :func:`.capture.capture_part`."""
    call = first_calls(calls)[0][0]
    by_name = products.modules_by_name({name: module})
    layers = {
        site.removeprefix(f"{name}."): float_layer(site, by_name[site])
        for site in sites
    }
    states = call.kwargs["encoder_hidden_states"][:1].detach()
    # Two utterances with two hypotheses each.
    four = torch.cat([states, states, *[0.5 * states.flip(1)] * 2])
    try:
        forward = _forward(module, layers, precision="f32")
        for rows in (states, four):
            ids = call.kwargs["input_ids"][:1].repeat(len(rows), 1)
            given = {"input_ids": ids, "encoder_hidden_states": rows}
            expected = decode(module, _TRIED, **given)
            with shadowed(module, "forward", forward):
                found = decode(module, _TRIED, **given)
            for one, two in zip(expected, found, strict=True):
                check_same(one, two.numpy(), ids.shape)
    # The graph may raise anything.
    except Exception as error:
        raise CaptureError(one_line(error)) from error
    return Part(name, "graph", "captured by its steps", way="steps")
