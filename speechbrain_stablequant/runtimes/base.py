"""What a runtime is, and how one takes the place of a float model.

A runtime executes an encoder from its description. `installed` shadows the
``forward`` of the HuggingFace model on the instance, as the simulation does
with single layers: the Brain, its wrapper and its checkpoints stay as they
are. Layers outside the encoder (the heads) are shadowed one by one.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ..utils.precision import plain_float32


class EncoderExecutor(Protocol):
    """Executes one encoder."""

    def __call__(
        self, wavs: torch.Tensor, lengths: torch.Tensor | None
    ) -> torch.Tensor:
        """Encodes a batch.

        Arguments
        ---------
        wavs : torch.Tensor
            float32 [batch, samples], normalized as the model wants it.
        lengths : torch.Tensor or None
            int64 [batch], real samples of each utterance; None when the
            model is to see no mask.

        Returns
        -------
        torch.Tensor
            float32 [batch, frames, channels]. Padded frames hold anything
            finite.
        """


class LayerExecutor(Protocol):
    """Executes one Linear or Conv1d: float input, float32 output."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


class EncoderOutput(NamedTuple):
    """What takes the place of transformers' ``BaseModelOutput``, by the same
    names and places; transformers takes seconds and 20 MB to import."""

    last_hidden_state: torch.Tensor
    hidden_states: None = None
    attentions: None = None


def require_frame(frames: int, samples: int) -> None:
    """Raises unless an input gives a frame.

    Arguments
    ---------
    frames : int
        Frames that the encoder makes of it.
    samples : int
        Its length.

    Raises
    ------
    ValueError
        There is none.
    """
    if frames < 1:
        raise ValueError(
            f"an input of {samples} samples is too short for the model; "
            "leave out utterances below 0.03 s"
        )


def encoder_forward(execute: EncoderExecutor) -> Callable[..., Any]:
    """The forward of a HuggingFace model that runs an executor.

    Arguments
    ---------
    execute : EncoderExecutor
        The executor.

    Returns
    -------
    callable
        Takes what SpeechBrain's wrapper passes to the model.
    """

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
        hidden = execute(input_values, lengths)
        return EncoderOutput(hidden)

    return forward


def modules_by_name(
    modules: Mapping[str, nn.Module], names: Collection[str]
) -> dict[str, nn.Module]:
    """The modules of layers.

    Arguments
    ---------
    modules : Mapping
        Modules by key.
    names : collection of str
        Names of layers.

    Returns
    -------
    dict
        Module by name.

    Raises
    ------
    ValueError
        A layer that is not in the model.
    """
    found = {
        path: child
        for key, module in modules.items()
        for path, child in module.named_modules(
            prefix=key, remove_duplicate=False
        )
        if path in names
    }
    for name in names:
        if name not in found:
            raise ValueError(
                f"layer '{name}' of the plan is not in the model; use the "
                "plan of this model"
            )
    return found


def in_own_precision(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that the recipe's precision does not change: a runtime says
    itself what it computes in 16 bits.

    Arguments
    ---------
    forward : callable
        Of a tensor and other arguments.

    Returns
    -------
    callable

    Example
    -------
    >>> forward = in_own_precision(lambda x: x @ x)
    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     forward(torch.ones(1, 1)).dtype
    torch.float32
    """

    def plain(*args: Any, **kwargs: Any) -> Any:
        x, *_ = *args, *kwargs.values()
        with plain_float32(x):
            return forward(*args, **kwargs)

    return plain


@contextmanager
def shadowed_forwards(
    forwards: Mapping[nn.Module, Callable[..., Any]],
) -> Iterator[None]:
    """Context in which modules compute by other functions.

    Arguments
    ---------
    forwards : Mapping
        The function by module.

    Raises
    ------
    RuntimeError
        A module is shadowed already.

    Example
    -------
    >>> linear = nn.Linear(1, 1)
    >>> with shadowed_forwards({linear: lambda x: x + 1}):
    ...     linear(torch.zeros(1)).item()
    1.0
    """
    done = []
    try:
        for module, forward in forwards.items():
            if "forward" in vars(module):
                raise RuntimeError(
                    f"{type(module).__name__}: is shadowed already"
                )
            module.forward = forward
            done.append(module)
        yield
    finally:
        for module in done:
            del module.forward
