"""Declares operators: reference, kernel and shape function."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton

NAMESPACE = "stablequant"

#: Whether kernels run on CPU, in Triton's interpreter.
INTERPRETED = bool(triton.knobs.runtime.interpret)


def _let_the_interpreter_loop() -> None:
    """Triton 3.6's interpreter has one-element arrays as loop bounds, which
    NumPy no longer accepts as integers since 2.4."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, *scope):
        patch(tensor, *scope)
        # earlier versions of Triton have no scope
        put = scope[0].set_attr if scope else setattr
        put(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


if INTERPRETED:
    _let_the_interpreter_loop()


@dataclass(frozen=True)
class Operator:
    """An operator's implementations: plain torch, and a Triton kernel."""

    reference: Callable
    launch: Callable


#: All declared operators, by name.
OPERATORS: dict[str, Operator] = {}


def declare(
    name: str,
    schema: str,
    reference: Callable,
    launch: Callable,
    shape: Callable,
) -> None:
    """Declares ``torch.ops.stablequant.<name>``.

    Arguments
    ---------
    name : str
        Name of the operator.
    schema : str
        Its arguments and results in torch's schema language.
    reference : callable
        Computes it with plain torch, on any device.
    launch : callable
        Computes it with a Triton kernel.
    shape : callable
        Returns empty results of the right shape and dtype, for torch.compile.
    """
    OPERATORS[name] = Operator(reference, launch)
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema)
    default = launch if INTERPRETED else reference
    torch.library.impl(qualified, "default", default)
    torch.library.impl(qualified, "cuda", _on_its_device(launch))
    torch.library.register_fake(qualified, shape)


def _on_its_device(launch: Callable) -> Callable:
    """Makes the tensors' device current, on which Triton launches."""

    @functools.wraps(launch)
    def run(first: torch.Tensor, *args, **kwargs):
        with torch.cuda.device(first.device):
            return launch(first, *args, **kwargs)

    return run


def check_rows(name: str, x: torch.Tensor) -> torch.Tensor:
    """[..., channels] as [rows, channels] with contiguous rows, without a copy;
    raises if the strides do not allow it."""
    rows = x if x.dim() == 2 else None
    if rows is None:
        try:
            rows = x.view(-1, x.shape[-1])
        except RuntimeError:
            rows = None
    if rows is None or (rows.shape[1] > 1 and rows.stride(1) != 1):
        raise ValueError(
            f"stablequant::{name}: strides {list(x.stride())} of a tensor of "
            f"shape {list(x.shape)} are not those of rows; make it contiguous"
        )
    return rows


def check_int8(name: str, **tensors: torch.Tensor) -> None:
    """Raises unless every tensor, given by argument name, is int8."""
    for argument, tensor in tensors.items():
        if tensor.dtype != torch.int8:
            raise TypeError(
                f"stablequant::{name}: {argument} must be int8, "
                f"got {tensor.dtype}"
            )
