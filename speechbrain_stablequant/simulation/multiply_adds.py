"""Counts the multiply-adds of a forward pass, by what holds the weight."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..core.plan_tensors import parameters_by_name
from ..model.layer import Layer
from ..model.layers import visible_layers
from ..model.products import attention_forward
from ..utils.patching import hooked

NO_WEIGHT = ""  #: key of products of two activations, such as attention scores

_Found = Iterator[tuple[int, torch.Tensor | None]]


def count_multiply_adds(
    layers: Sequence[Layer],
    modules: Mapping[str, nn.Module],
    run: Callable[[], Any],
) -> dict[str, int]:
    """Multiply-adds of ``run`` by layer, else by parameter."""
    counter = _Counting(modules)
    begin = [(x.module, partial(counter.begin, x.name)) for x in layers]
    end = [(x.module, counter.end) for x in layers]
    with (
        visible_layers(layers),
        hooked(begin),
        hooked(end, after=True),
        counter,
    ):
        run()
    return dict(counter.counts)


class _Counting(TorchFunctionMode):
    def __init__(self, modules: Mapping[str, nn.Module]):
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._layer: str | None = None
        # A parameter has its first name, as in core.account.
        self._names = {
            parameter.untyped_storage().data_ptr(): name
            for name, parameter in reversed(parameters_by_name(modules).items())
        }

    def begin(self, name: str, module: nn.Module, args: tuple) -> None:
        self._layer = name

    def end(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._layer = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return attention_forward(*args, **kwargs)
        out = func(*args, **kwargs)
        rule = _RULES.get(getattr(func, "__name__", ""))
        if rule is not None:
            for count, weight in rule(out, *args, *kwargs.values()):
                self.counts[self._layer or self._name(weight)] += count
        return out

    def _name(self, weight: torch.Tensor | None) -> str:
        if weight is None:
            return NO_WEIGHT
        place = weight.untyped_storage().data_ptr()
        return self._names.get(place, NO_WEIGHT)


# -- rules: the output of a function and its arguments -------------------------


def _linear(out, x, weight, *_) -> _Found:
    yield x.numel() * len(weight), weight


def _conv(out, x, weight, *_) -> _Found:
    yield out.numel() * weight[0].numel(), weight


def _matmul(out, x, y, *_) -> _Found:
    weight = x if isinstance(x, nn.Parameter) else y
    yield out.numel() * x.shape[-1], weight


def _added(out, start, *args) -> _Found:
    return _matmul(out, *args)


def _attention(out, query, key, *_) -> _Found:
    yield (query.numel() + out.numel()) * key.shape[-2], None


def _einsum(out: torch.Tensor, equation: str, *operands: Any) -> _Found:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        (operands,) = operands
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, operand in zip(terms, operands, strict=True):
        sizes |= dict(zip(term, operand.shape, strict=False))
    weights = [x for x in operands if isinstance(x, nn.Parameter)]
    yield math.prod(sizes.values()), weights[0] if weights else None


def _recurrent(out: Any, x: torch.Tensor, *args: Any) -> _Found:
    """Of a whole layer or of one step."""
    rows = x.numel() // x.shape[-1]
    for arg in args:
        for weight in arg if isinstance(arg, list | tuple) else [arg]:
            if isinstance(weight, nn.Parameter) and weight.dim() == 2:
                yield rows * weight.numel(), weight


_RULES: dict[str, Callable[..., _Found]] = {
    "linear": _linear,
    "conv1d": _conv,
    "conv2d": _conv,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "mm": _matmul,
    "bmm": _matmul,
    "addmm": _added,
    "baddbmm": _added,
    "scaled_dot_product_attention": _attention,
    "einsum": _einsum,
}
for _name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
    _RULES |= {_name: _recurrent, f"{_name}_cell": _recurrent}
