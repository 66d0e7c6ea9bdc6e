"""Replaces the forwards of a float model by those of a runtime.

``forward`` is replaced on the instance by ``utils.patching.shadowed_forwards``,
so that the Brain, its wrapper and its checkpoints stay as they are.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ..model import products
from ..utils.precision import plain_float32
from .base import EncoderExecutor


class EncoderOutput(NamedTuple):
    """transformers' ``BaseModelOutput`` by name, without importing it."""

    last_hidden_state: torch.Tensor
    hidden_states: None = None
    attentions: None = None


def encoder_forward(execute: EncoderExecutor) -> Callable[..., Any]:
    """A HuggingFace model's forward that runs an executor."""

    def forward(
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        **kwargs: Any,
    ) -> EncoderOutput:
        if output_hidden_states or kwargs.get("output_attentions"):
            raise ValueError(
                "an integer runtime gives the last hidden state only; use "
                "backend: torch for output_all_hiddens"
            )
        lengths = None
        if attention_mask is not None:
            lengths = attention_mask.long().sum(1)
        return EncoderOutput(execute(input_values, lengths))

    return forward


def find_modules(
    modules: Mapping[str, nn.Module], names: Collection[str]
) -> dict[str, nn.Module]:
    """Module by name; ValueError for one that is not in the model."""
    found = products.modules_by_name(modules)
    for name in names:
        if name not in found:
            raise ValueError(
                f"layer '{name}' of the plan is not in the model; use the "
                "plan of this model"
            )
    return {name: found[name] for name in names}


def layer_forwards(
    modules: Mapping[str, nn.Module], forwards: Mapping[str, Callable[..., Any]]
) -> dict[nn.Module, Callable[..., Any]]:
    """Forwards by module of layers and of owners that make them visible."""
    layers = find_modules(modules, forwards)
    by_name = products.modules_by_name(modules)
    owners = [x for name in forwards for x in products.owners_of(name, by_name)]
    return {
        **products.visible_forwards(owners),
        **{layers[name]: forward for name, forward in forwards.items()},
    }


def in_own_precision(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a forward so that the recipe's autocast does not affect it."""

    def plain(*args: Any, **kwargs: Any) -> Any:
        x = next(
            x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)
        )
        # Entering the context takes as long as a small product.
        if not x.is_cuda and not torch.is_autocast_enabled(x.device.type):
            return forward(*args, **kwargs)
        with plain_float32(x):
            return forward(*args, **kwargs)

    return plain
