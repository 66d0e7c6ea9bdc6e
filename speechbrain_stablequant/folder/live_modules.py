"""Modules of any recognizer that compute with a runtime.

Searchers and decoders keep their references: what changes is ``forward`` on the
instances of quantized layers.
"""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.integer_layer import IntegerLayer, in_integers
from ..model.encoders import find_encoders
from ..runtimes.build import build_forwards, check_probe
from ..runtimes.forwards import find_modules, layer_forwards
from ..runtimes.probe import Compute, Probe
from ..runtimes.probe_make import evaluating, make_probe, weight_forms
from ..runtimes.registry import check_options, select_options
from ..runtimes.simulated import simulated_forwards
from .errors import reading
from .module_state import (
    PREFIX,
    set_hidden_state,
    take_computed,
    training_buffers,
)
from .runtime_slot import BuiltRuntime, RuntimeSlot
from .stored_floats import fill_modules
from .weights_file import Checkpoint

#: Tokens that a probe gives a decoder, the step between them, and about how
#: many logits it compares.
_TOKENS, _TOKEN_STEP, _LOGITS = 8, 97, 512


def encode(
    parts: Sequence[nn.Module],
    wavs: torch.Tensor,
    relative: torch.Tensor,
) -> torch.Tensor:
    """The encoder's output as SpeechBrain's classes compute it: of a Whisper,
    or of an encoder and the Transformer behind it, if any."""
    first, *others = parts
    if hasattr(first, "forward_encoder"):
        return first.forward_encoder(first._get_mel(wavs))
    x = first(wavs, relative)
    for other in others:
        x = other.encode(x, relative)
    return x


def probed(
    parts: Sequence[nn.Module],
    wavs: torch.Tensor,
    relative: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a probe compares: the output of :func:`encode`, and some logits of
    a Whisper's decoder for given tokens, one by one."""
    hidden, whisper = encode(parts, wavs, relative), parts[0]
    decoder = getattr(getattr(whisper, "model", None), "decoder", None)
    decodes = decoder is not None and hasattr(whisper, "forward_decoder")
    if not decodes or hidden.dim() > 3:
        return hidden, None
    size, start = decoder.embed_tokens.weight.shape[0], whisper.bos
    ids = (start + _TOKEN_STEP * torch.arange(_TOKENS)) % size
    ids = ids.to(hidden.device).expand(len(hidden), -1)
    found, cache = [], None
    for count in range(1, _TOKENS + 1):
        logits, _, cache = whisper.forward_decoder(
            hidden, ids[:, :count], past_key_values=cache
        )
        found.append(logits[:, -1:, :: -(-size // _LOGITS)])
    return hidden, torch.cat(found, 1)


class LiveModules:
    """Gives modules what a folder stores, and forwards of a runtime.

    Any number of threads may call the modules; copies and forked processes
    build runtimes of their own. ``parts``: see :func:`encode`.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        parts: Sequence[nn.Module],
        backend: str,
        options: Mapping[str, Any],
    ):
        self.modules = dict(modules)
        self.parts = tuple(parts)
        self.backend = backend
        self.options = check_options(backend, options)
        self._begin()

    def _begin(self) -> None:
        self._slot = RuntimeSlot(self.backend, self._build, self._install)
        # Forwards of a runtime that this thread is checking.
        self._trial = threading.local()

    @property
    def runtime(self) -> str | None:
        """The runtime in use; None before the first batch."""
        return self._slot.name

    def load(
        self,
        checkpoint: Checkpoint,
        read: Callable[[], Checkpoint],
        path: Path,
    ) -> None:
        """Fills the modules; ``read`` reads the same checkpoint again."""
        floats = dict(checkpoint.floats)
        state = {n: floats.pop(n) for n in list(floats) if n.startswith(PREFIX)}
        with reading(path, "does not fit the model", "make it again"):
            computed = take_computed(self.modules, floats)
        floats = {**training_buffers(self.modules), **computed, **floats}
        fill_modules(self.modules, checkpoint.integers, floats, path)
        set_hidden_state(self.modules, state, path)
        self._read, self.probe = read, checkpoint.probe
        integers = in_integers(checkpoint.integers)
        self._integers: dict[str, IntegerLayer] | None = integers
        self.plan = checkpoint.plan
        layers = find_modules(self.modules, integers)
        dispatch = {name: _Dispatch(self, x) for name, x in layers.items()}
        forwards = layer_forwards(self.modules, dispatch)
        encoders = [x.model for x in find_encoders(self.modules)]
        graphs = [x.name for x in self.plan.parts if x.executes == "graph"]
        graphs = find_modules(self.modules, graphs).values()
        forwards |= {x: _Dispatch(self, x) for x in (*encoders, *graphs)}
        for module, forward in forwards.items():
            module.forward = forward

    def __deepcopy__(self, memo: dict[int, Any]) -> "LiveModules":
        """Returns a copy that builds its own runtime from the folder."""
        twin = memo[id(self)] = type(self).__new__(type(self))
        vars(twin).update(vars(self))
        twin._integers = None
        twin._begin()
        twin.modules = copy.deepcopy(self.modules, memo)
        twin.parts = copy.deepcopy(self.parts, memo)
        return twin

    def forward_of(
        self, module: nn.Module, inputs: Sequence[Any]
    ) -> Callable[..., Any]:
        """What computes a module: the runtime's function, or its own."""
        forwards = getattr(self._trial, "forwards", None)
        if forwards is None:
            x = next(x for x in inputs if isinstance(x, torch.Tensor))
            forwards = self._slot.ready(x.device).forwards
        return forwards.get(module) or partial(type(module).forward, module)

    def _build(self, name: str, device: torch.device) -> BuiltRuntime:
        if self._integers is None:
            self._integers = in_integers(self._read().integers)
        integers = {n: x.to(device) for n, x in self._integers.items()}
        options = select_options(name, self.options)
        # Parts are captured with the modules' own forwards.
        with self.trying({}):
            forwards = build_forwards(
                name,
                self.modules,
                integers,
                parts=self.plan.parts,
                residual_amax=self.plan.residual_amax,
                **options,
            )
        if self.probe is not None:
            with self.trying(forwards):
                check_probe(name, self.probe, self.compute, device, options)
        return BuiltRuntime(name, device, forwards)

    def _install(self, built: BuiltRuntime | None) -> None:
        if built is not None:
            # The runtime keeps what it needs; release the second copy.
            self._integers = None

    @contextmanager
    def trying(
        self, forwards: Mapping[nn.Module, Callable[..., Any]]
    ) -> Iterator[None]:
        """Context in which this thread computes with other forwards."""
        self._trial.forwards = forwards
        try:
            yield
        finally:
            del self._trial.forwards

    def make_probe(self, rate: int) -> Probe:
        """The probe of these modules, from their simulation on the CPU."""

        def simulated(layers: Mapping[str, IntegerLayer]) -> Compute:
            forwards = simulated_forwards(self.modules, layers)

            def compute(wavs: torch.Tensor, relative: torch.Tensor) -> Any:
                with self.trying(forwards):
                    return self.compute(wavs, relative)

            return compute

        integers = {n: x.loaded() for n, x in self._integers.items()}
        forms = weight_forms(integers)
        parts = {str(i): part for i, part in enumerate(self.parts)}
        with evaluating({**self.modules, **parts}):
            return make_probe(
                {form: simulated(layers) for form, layers in forms.items()},
                self.modules,
                None,
                rate,
            )

    def compute(
        self, wavs: torch.Tensor, relative: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What a probe compares."""
        return probed(self.parts, wavs, relative)


class _Dispatch:
    """The forward of a module of :class:`LiveModules`."""

    hidden = None  # see products.visible_forwards

    def __init__(self, owner: LiveModules, module: nn.Module):
        self.owner = owner
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = (*args, *kwargs.values())
        return self.owner.forward_of(self.module, inputs)(*args, **kwargs)
