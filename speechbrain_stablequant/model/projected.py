"""Products of a module's output that its caller computes, outside of any
module, by the weight of an embedding."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def projected(output: Any, product: nn.Module) -> Any:
    """A transformers' output whose hidden state, multiplied by the weight of
    ``product``, calls that module."""
    hidden = output.last_hidden_state.as_subclass(Projected)
    hidden.product = product
    output.last_hidden_state = hidden
    return output


class Projected(torch.Tensor):
    """An output whose product with the weight of ``product`` calls that module;
    all else is computed as of a plain tensor."""

    product: nn.Module

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _PRODUCTS and isinstance(args[0], cls):
                module = args[0].product
                places = (
                    x.untyped_storage().data_ptr()
                    for x in (args[1], module.weight)
                )
                if len(set(places)) == 1:
                    return module(args[0].as_subclass(torch.Tensor))
            return func(*args, **(kwargs or {}))


_PRODUCTS = (
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    F.linear,
)
