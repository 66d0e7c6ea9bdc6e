"""Declares operators, and checks their arguments."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton

#: Whether kernels run on CPU, in Triton's interpreter.
INTERPRETED = bool(triton.knobs.runtime.interpret)


class Operator(NamedTuple):
    """An operator's implementations."""

    reference: Callable  # in plain torch, on any device
    launch: Callable  # with a Triton kernel


#: All declared operators, by name.
OPERATORS: dict[str, Operator] = {}


def declare(name: str, reference: Callable, launch: Callable) -> None:
    """Declares ``torch.ops.stablequant.<name>``; the reference's annotations
    are its schema, and its result has the shape and strides of ``launch``'s."""
    OPERATORS[name] = Operator(reference, launch)
    qualified = f"stablequant::{name}"
    schema = torch.library.infer_schema(reference, mutates_args=())
    torch.library.define(qualified, schema.replace("SymInt", "int"))
    default = launch if INTERPRETED else reference
    torch.library.impl(qualified, "default", default)
    torch.library.impl(qualified, "cuda", _on_its_device(launch))
    torch.library.register_fake(qualified, reference)


def _on_its_device(launch: Callable) -> Callable:
    """Makes the tensors' device current, on which Triton launches."""

    @functools.wraps(launch)
    def run(first: torch.Tensor, *args, **kwargs):
        with torch.cuda.device(first.device):
            return launch(first, *args, **kwargs)

    return run


def check_rows(operator: str, x: torch.Tensor) -> torch.Tensor:
    """[..., channels] as [rows, channels] with contiguous rows, without a copy;
    raises if the strides do not allow it."""
    try:
        rows = x.view(-1, x.shape[-1]) if x.dim() != 2 else x
        if rows.shape[1] == 1 or rows.stride(1) == 1:
            return rows
    except RuntimeError:
        pass
    raise ValueError(
        f"stablequant::{operator}: strides {list(x.stride())} of a tensor of "
        f"shape {list(x.shape)} are not those of rows; make it contiguous"
    )


def check_dtype(
    operator: str, dtype: torch.dtype, **tensors: torch.Tensor
) -> None:
    """Raises unless every tensor, given by argument name, has a dtype."""
    for argument, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise TypeError(
                f"stablequant::{operator}: {argument} must be "
                f"{str(dtype).removeprefix('torch.')}, got {tensor.dtype}"
            )


def check_contiguous(
    operator: str,
    argument: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...] | None = None,
) -> None:
    """Raises unless a tensor is contiguous and has a shape, if one is given."""
    expected = tensor.shape if shape is None else shape
    if tuple(tensor.shape) != tuple(expected) or not tensor.is_contiguous():
        raise ValueError(
            f"stablequant::{operator}: {argument} must be contiguous "
            f"{list(expected)}, got {list(tensor.shape)} with strides "
            f"{list(tensor.stride())}"
        )


def output_frames(operator: str, frames: int, kernel: int, stride: int) -> int:
    """Output frames of a convolution; raises if its input is too short."""
    if frames < kernel:
        raise ValueError(
            f"stablequant::{operator}: {frames} frames are fewer than the "
            f"kernel's {kernel}"
        )
    return (frames - kernel) // stride + 1
