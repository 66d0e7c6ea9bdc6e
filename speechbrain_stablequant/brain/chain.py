"""The chain of modules that a recipe calls, observed on one batch."""

import itertools
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import speechbrain as sb
import torch
from torch import nn

from .data import audio_of
from .passes import recognize

if TYPE_CHECKING:
    from ..methods.registry import QuantizeConfig


class NoFolderError(ValueError):
    """A recipe that cannot be rebuilt from a folder, and why, in one line."""


@dataclass(frozen=True)
class Call:
    """One call of a module of the Brain."""

    key: str
    args: tuple
    kwargs: dict[str, Any]
    output: Any

    @property
    def inputs(self) -> tuple:
        """Positional arguments, then the values of keyword arguments."""
        return *self.args, *self.kwargs.values()


def find_chain(
    brain: sb.Brain, batch: Any, config: "QuantizeConfig"
) -> list[Call]:
    """Calls of the Brain's modules; each gets the previous one's output."""
    calls = observe(brain, batch, keyed_modules(brain, config.target))
    _check_chain(calls, batch, config.signal, str(brain.device))
    return calls


def keyed_modules(
    brain: sb.Brain, target: Iterable[str]
) -> dict[str, nn.Module]:
    """The Brain's modules, each once, by the key that names its layers."""
    every = dict(brain.modules.items())
    keyed: dict[nn.Module, str] = {}
    for key in (*target, *every):
        keyed.setdefault(every[key], key)
    return {key: module for module, key in keyed.items()}


def observe(
    brain: sb.Brain, batch: Any, modules: Mapping[str, nn.Module]
) -> list[Call]:
    """The calls of modules while the Brain recognizes a batch."""
    calls: list[Call] = []

    def record(key: str, _, args: tuple, kwargs: dict, output: Any) -> None:
        calls.append(Call(key, args, kwargs, output))

    with ExitStack() as stack:
        for key, module in modules.items():
            stack.enter_context(
                module.register_forward_hook(
                    partial(record, key), with_kwargs=True
                )
            )
        recognize(brain, batch)
    return calls


def _check_chain(
    calls: list[Call], batch: Any, signal: str, device: str
) -> None:
    """Raise unless each module is called once, on the previous output."""
    if not calls:
        raise NoFolderError("the recipe calls none of its `modules`")
    for call in calls:
        if sum(other.key == call.key for other in calls) > 1:
            raise NoFolderError(f"the recipe calls '{call.key}' repeatedly")
    wavs, _ = audio_of(batch, signal)
    if not _same(calls[0].inputs[:1], (wavs.to(device),)):
        raise NoFolderError(
            f"'{calls[0].key}' gets something other than the audio: the "
            "recipe changes it first"
        )
    for before, after in itertools.pairwise(calls):
        if not _same(after.inputs, (before.output,)):
            raise NoFolderError(
                f"'{after.key}' gets something other than the output of "
                f"'{before.key}'"
            )


def _same(one: tuple, two: tuple) -> bool:
    return len(one) == len(two) and all(
        isinstance(a, torch.Tensor)
        and isinstance(b, torch.Tensor)
        and torch.equal(a, b)
        for a, b in zip(one, two, strict=True)
    )
