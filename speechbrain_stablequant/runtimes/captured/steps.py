"""Executes the graphs of a decoder, see :mod:`.decoder_graph`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import openvino as ov
import torch
from torch import nn

from ...core.encoder_spec import AnyLayer
from ...model import products
from ...model.projected import projected
from ...utils import forks
from ..openvino_ import OpenVinoOptions
from ..openvino_.core import CompiledGraph
from .decoder_graph import PROJECTION, DecoderGraphs

_SETTINGS = {
    "CPU_RUNTIME_CACHE_CAPACITY": 100,
    # The bytes of weights take the time of a step, not what is computed.
    "INFERENCE_PRECISION_HINT": "f32",
    # OpenVINO would round the keys, values and inputs to 8 bits.
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}


class _Graph(CompiledGraph):
    def __init__(self, model: ov.Model, options: OpenVinoOptions):
        super().__init__(options)
        self.settings |= _SETTINGS
        self.compile(model)

    def take(self) -> ov.InferRequest:
        try:
            return self._idle.pop()
        except IndexError:
            return self._compiled.create_infer_request()

    def give_back(self, request: ov.InferRequest) -> None:
        self._idle.append(request)


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
        self.cross = _Graph(graphs.cross(), options)
        self.step = _Graph(graphs.step(), options)

    def __deepcopy__(self, memo: dict) -> "DecoderExecutor":
        """Copies of a module share its graphs."""
        return self


class Steps:
    """A decoding so far, in the place of transformers' cache.

    ``states``: the encoder's, a row for each hypothesis; equal ones that
    follow each other share their keys and values.
    """

    def __init__(self, executor: DecoderExecutor, states: torch.Tensor):
        forks.use_in_one_process("openvino")
        self.executor = executor
        self.length = 0
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
        raise TypeError("a decoding that runs cannot be copied")

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

    def get_seq_length(self) -> int:
        """The number of tokens, as in transformers."""
        return self.length

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
        return [
            torch.from_numpy(self._step.get_output_tensor(i).data.copy())
            for i in range(len(self._step.model_outputs))
        ]


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


@dataclass
class DecoderOutput:
    """transformers' output by its names."""

    last_hidden_state: torch.Tensor
    past_key_values: Steps | None
    hidden_states: None = None
    attentions: None = None
    cross_attentions: None = None


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
        output = DecoderOutput(found[0], None if use_cache is False else steps)
        if not self._executor.projects:
            return output
        layer = products.virtual_linears(module)[PROJECTION]
        return projected(output, _Logits(layer, found[1]))

    def _own(self, **kwargs: Any) -> Any:
        module = self._module
        output = type(module).forward(module, **kwargs)
        if not self._executor.projects:
            return output
        return projected(output, products.virtual_linears(module)[PROJECTION])
