"""Temporary changes of modules: attributes, values and hooks."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


@contextmanager
def shadowed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an instance attribute, and restores the previous state."""
    had = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def shadowed_forwards(
    forwards: Mapping[nn.Module, Callable[..., Any]],
) -> Iterator[None]:
    """Lets modules compute by other functions; refuses replaced ones."""
    with ExitStack() as stack:
        for module, forward in forwards.items():
            if "forward" in vars(module):
                raise ValueError(
                    f"{type(module).__name__}: its forward is replaced "
                    "already; delete the attribute of the instance first"
                )
            stack.enter_context(shadowed(module, "forward", forward))
        yield


@contextmanager
def own_forwards(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Lets modules of :func:`shadowed_forwards` compute by themselves again."""
    shadows = {module: vars(module).pop("forward") for module in modules}
    try:
        yield
    finally:
        for module, forward in shadows.items():
            module.forward = forward


@contextmanager
def restored(owner: Any) -> Iterator[None]:
    attributes = vars(owner).copy()
    try:
        yield
    finally:
        vars(owner).clear()
        vars(owner).update(attributes)


@contextmanager
def replaced_item(mapping: dict, key: Any, value: Any) -> Iterator[None]:
    before, mapping[key] = mapping[key], value
    try:
        yield
    finally:
        mapping[key] = before


@contextmanager
def restored_values(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Restores the values of tensors that are changed in place."""
    # By id, so that a tensor that is listed twice is copied once.
    kept = {id(t): (t, t.detach().clone()) for t in tensors}
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in kept.values():
                tensor.copy_(value)


@contextmanager
def hooked(
    hooks: Iterable[tuple[nn.Module, Callable[..., Any]]], after: bool = False
) -> Iterator[None]:
    """Calls each hook before, or after, the forward of its module."""
    with ExitStack() as stack:
        for module, hook in hooks:
            if after:
                handle = module.register_forward_hook(hook)
            else:
                handle = module.register_forward_pre_hook(hook)
            stack.enter_context(handle)
        yield


class _Uninitialized(TorchFunctionMode):
    """Leaves out the random initialization of modules."""

    _RANDOM = ("kaiming_uniform_", "kaiming_normal_", "uniform_", "normal_")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.__name__ in self._RANDOM:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def on_meta() -> Iterator[None]:
    """Makes modules on the ``meta`` device, without storage.

    Random numbers, of no use there, make torch 2.8 import sympy.
    """
    with torch.device("meta"), _Uninitialized():
        yield
