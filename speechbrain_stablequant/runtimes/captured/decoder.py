"""A decoder as a part of a plan: whether its graphs compute it, and its forward
by them, see :mod:`.decoder_graph`."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import openvino as ov
import torch
from torch import nn

from ...core.integer_layer import AnyLayer, IntegerLayer, float_layer
from ...core.parts import Part
from ...model import products
from ...model.projected import projected
from ...utils import forks
from ...utils.patching import shadowed
from ...utils.typed import one_line
from ..layer_check import heads_with_algorithms
from ..openvino_ import OpenVinoOptions
from ..openvino_.core import CompiledGraph, output
from ..openvino_.layer_runner import OpenVINORunner
from .calls import Call, CaptureError, say_uncaptured
from .capture import check_same
from .decoder_graph import PROJECTION, DecoderGraphs

#: Steps after a first call: of a trial, and of a timed pass.
_TRIED, _TIMED = 2, 8

_SETTINGS = {
    "CPU_RUNTIME_CACHE_CAPACITY": 100,
    # The bytes of weights take the time of a step, not what is computed.
    "INFERENCE_PRECISION_HINT": "f32",
    # OpenVINO would round the keys, values and inputs to 8 bits.
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}


class DecoderExecutor:
    """Computes a decoder. Any number of threads may call it."""

    def __init__(
        self,
        decoder: nn.Module,
        layers: Mapping[str, AnyLayer],
        options: OpenVinoOptions,
    ):
        graphs = DecoderGraphs(decoder, layers)
        self.projects = graphs.projects
        self.cross, self.step = CompiledGraph(options), CompiledGraph(options)
        self.cross.compile(graphs.cross(), **_SETTINGS)
        self.step.compile(graphs.step(), **_SETTINGS)

    def __deepcopy__(self, memo: dict) -> "DecoderExecutor":
        """Copies of a module share its graphs."""
        return self


class Steps:
    """A decoding so far, in the place of transformers' cache.

    ``states``: the encoder's, a row for each hypothesis; equal ones that
    follow each other share their keys and values.
    """

    def __init__(self, executor: DecoderExecutor, states: torch.Tensor):
        self.executor = executor
        self.length = 0  # number of tokens
        self._cross, self._step = executor.cross.take(), executor.step.take()
        self._step.reset_state()
        self._share = _shared_rows(states)
        self._rows = np.arange(len(states), dtype=np.int32)
        self._cross.infer([_array(states[:: self._share])], share_inputs=True)
        count = len(self._cross.model_outputs)
        self._memory = [self._cross.get_output_tensor(i) for i in range(count)]
        self._give_memory()

    def __del__(self):
        if hasattr(self, "_memory"):
            self.executor.cross.give_back(self._cross)
            self.executor.step.give_back(self._step)

    def __deepcopy__(self, memo: dict) -> "Steps":
        """A searcher keeps its last decoding. A copy is left without it."""
        return Steps.__new__(Steps)

    def __getattr__(self, name: str) -> Any:
        # Of a copy, which has nothing.
        raise AttributeError("a decoding that runs cannot be copied")

    def _give_memory(self) -> None:
        for place, tensor in enumerate(self._memory, 3):
            self._step.set_input_tensor(place, tensor)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Continue the rows of these numbers, as in transformers."""
        index = beam_idx.cpu().numpy().astype(np.int32)
        self._rows = self._rows[index]
        places = np.arange(len(index)) // self._share
        if len(index) % self._share or any(index // self._share != places):
            # Rows change their utterance.
            rows = index // self._share
            self._memory = [ov.Tensor(x.data[rows]) for x in self._memory]
            self._share = 1
            self._give_memory()

    def compute(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """The outputs of the step for more tokens."""
        forks.use_in_one_process("openvino")
        count = hidden.shape[1]
        total = self.length + count
        mask = np.full((1, 1, count, total), -np.inf, dtype=np.float32)
        mask = np.triu(mask, 1 + self.length)
        given = _array(hidden), self._rows, mask
        for place, array in enumerate(given):
            self._step.set_input_tensor(place, ov.Tensor(array))
        self._step.infer()
        self.length = total
        self._rows = np.arange(len(hidden), dtype=np.int32)
        places = range(len(self._step.model_outputs))
        return [output(self._step, place) for place in places]


def _array(x: torch.Tensor) -> np.ndarray:
    return x.detach().cpu().float().contiguous().numpy()


def _shared_rows(states: torch.Tensor) -> int:
    """The number of rows of each utterance."""
    starts = [
        i
        for i in range(1, len(states))
        if not torch.equal(states[i], states[i - 1])
    ]
    edges = [0, *starts, len(states)]
    return math.gcd(*(stop - start for start, stop in pairwise(edges)))


class _Logits:
    """The product of a hidden state that has been computed already."""

    def __init__(self, layer: nn.Module, logits: torch.Tensor):
        self._layer, self._logits = layer, logits

    @property
    def weight(self) -> torch.Tensor:
        """What the product is recognized by."""
        return self._layer.weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._logits


class DecoderForward:
    """The forward of a decoder by its graphs. What SpeechBrain does not ask
    for is computed by the module itself."""

    def __init__(self, module: nn.Module, executor: DecoderExecutor):
        self._module = module
        self._executor = executor

    @torch.no_grad()
    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **others: Any,
    ) -> Any:
        """As the module's."""
        plain = past_key_values is None or isinstance(past_key_values, Steps)
        asked = any(x is not None and x is not False for x in others.values())
        if input_ids is None or asked or not plain:
            return self._own(
                input_ids=input_ids,
                encoder_hidden_states=encoder_hidden_states,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **others,
            )
        steps = past_key_values
        if steps is None:
            steps = Steps(self._executor, encoder_hidden_states)
        module, start = self._module, steps.length
        places = torch.arange(start, start + input_ids.shape[1])
        hidden = module.embed_tokens(input_ids)
        hidden = hidden + module.embed_positions.weight[places]
        found = steps.compute(hidden)
        # transformers' output by its names.
        given = SimpleNamespace(
            last_hidden_state=found[0],
            past_key_values=None if use_cache is False else steps,
            hidden_states=None,
            attentions=None,
            cross_attentions=None,
        )
        if not self._executor.projects:
            return given
        layer = products.virtual_linears(module)[PROJECTION]
        return projected(given, _Logits(layer, found[1]))

    def _own(self, **kwargs: Any) -> Any:
        module = self._module
        say_uncaptured(type(module).__name__)
        output = type(module).forward(module, **kwargs)
        if not self._executor.projects:
            return output
        return projected(output, products.virtual_linears(module)[PROJECTION])


# -- as a part -----------------------------------------------------------------


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
        made = module(
            input_ids=input_ids,
            encoder_hidden_states=encoder_hidden_states,
            past_key_values=cache,
            use_cache=True,
        )
        found.append(made.last_hidden_state @ weight)
        cache, input_ids = made.past_key_values, input_ids[:, -1:]
        if len(input_ids) > 1:
            cache.reorder_cache(torch.arange(len(input_ids)).flip(0))
    return found


def decoder_part(
    name: str, module: nn.Module, calls: Sequence[Call], sites: Iterable[str]
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
