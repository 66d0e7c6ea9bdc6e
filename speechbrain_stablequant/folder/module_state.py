"""What modules keep outside of their state dict, as tensors of a file.

SpeechBrain's ``InputNormalization`` has its statistics in attributes, and hooks
that save and load them.
"""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from speechbrain.utils import checkpoints
from torch import nn

from .errors import CheckpointError
from .stored_floats import stored_float

#: Prefix of the tensors in a file; no module parameter begins with it.
PREFIX = ".state."
#: Of buffers that are computed when a module is made.
COMPUTED = ".computed."
#: Smallest number of their values.
_LEAST = 1024


def hidden_state(modules: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Tensors that modules save by hooks of their own, by prefixed name.

    Bits of floats are stored as integers: nothing rounds them.
    """
    found = {}
    hooks = checkpoints.DEFAULT_SAVE_HOOKS
    for name, module in hooked_modules(modules):
        save = checkpoints.get_default_hook(module, hooks)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state"
            save(module, path)
            rows = torch.load(path, map_location="cpu", weights_only=True)
        for key, value in _rows(name, rows).items():
            x = torch.as_tensor(value)
            if x.is_floating_point():
                x = x.float().contiguous().view(torch.int32)
            found[f"{PREFIX}{name}.{key}.{_kind(value)}"] = x.contiguous()
    return found


def training_buffers(
    modules: Mapping[str, nn.Module],
) -> dict[str, torch.Tensor]:
    """Noise that SpeechBrain's recurrent layers keep for their training, as
    much as weights; a folder does without."""
    return {
        name: buffer
        for name, buffer in _buffers(modules).items()
        if name.endswith(".drop_masks")
    }


def computed_buffers(
    modules: Mapping[str, nn.Module],
    made: Mapping[str, nn.Module],
    float_dtype: str,
) -> dict[str, torch.Tensor]:
    """Larger buffers, such as tables of positions, that newly ``made`` modules
    compute to the same stored values, by name: a file holds the bits of these
    values in the place of each."""
    found, fresh = {}, _buffers(made)
    for name, buffer in _buffers(modules).items():
        if buffer.numel() < _LEAST or name not in fresh:
            continue
        one, two = (stored_float(x, float_dtype) for x in (buffer, fresh[name]))
        if one.is_floating_point() and torch.equal(one, two):
            bits = torch.tensor([8 * one.element_size()], dtype=torch.uint8)
            found[name] = bits
    return found


def take_computed(
    modules: Mapping[str, nn.Module], floats: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Takes out what :func:`computed_buffers` has noted; returns the buffers
    of newly made modules, rounded as a file stores them."""
    fresh, found = _buffers(modules), {}
    for name in [x for x in floats if x.startswith(COMPUTED)]:
        bits, own = floats.pop(name), name.removeprefix(COMPUTED)
        if own not in fresh or bits.tolist() not in ([16], [32]):
            raise ValueError(f"it has no buffer '{own}' to compute")
        dtype = f"float{int(bits)}"
        found[own] = stored_float(fresh[own], dtype).float()
    return found


def _buffers(modules: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    return {
        name: buffer
        for key, module in modules.items()
        for name, buffer in module.named_buffers(prefix=key)
    }


def set_hidden_state(
    modules: Mapping[str, nn.Module],
    state: Mapping[str, torch.Tensor],
    where: str | Path,
) -> None:
    """Gives modules what :func:`hidden_state` has read."""
    left, hooks = dict(state), checkpoints.DEFAULT_LOAD_HOOKS
    for name, module in hooked_modules(modules):
        rows = {}
        for full in list(left):
            if full.startswith(f"{PREFIX}{name}."):
                key, kind = full.removeprefix(f"{PREFIX}{name}.").split(".")
                rows[key] = _value(left.pop(full), kind)
        if not rows:
            raise CheckpointError(
                f"{where}: has no statistics of '{name}'; make it again"
            )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state"
            torch.save(rows, path)
            load = checkpoints.get_default_hook(module, hooks)
            load(module, path, False)
    if left:
        raise CheckpointError(
            f"{where}: has statistics '{next(iter(left))}' that the model "
            "does not take; the folder's files belong to different models"
        )


def hooked_modules(
    modules: Mapping[str, nn.Module],
) -> Iterator[tuple[str, nn.Module]]:
    """Modules that save by a hook that is not that of every module, by name."""
    hooks, seen = checkpoints.DEFAULT_SAVE_HOOKS, set()
    for key, module in modules.items():
        for name, child in module.named_modules(prefix=key):
            hook = checkpoints.get_default_hook(child, hooks)
            if hook is not hooks[nn.Module] and id(child) not in seen:
                seen.add(id(child))
                yield name, child


def _rows(name: str, rows: Any) -> dict[str, Any]:
    plain = isinstance(rows, dict) and all(
        isinstance(key, str)
        and "." not in key
        and isinstance(value, torch.Tensor | int | float)
        for key, value in rows.items()
    )
    if not plain:
        raise CheckpointError(
            f"{name}: saves something other than named tensors and numbers, "
            "which cannot be stored without pickle"
        )
    return rows


def _kind(value: Any) -> str:
    kind = "float" if torch.as_tensor(value).is_floating_point() else "int"
    return kind if isinstance(value, torch.Tensor) else f"{kind}_number"


def _value(x: torch.Tensor, kind: str) -> Any:
    if kind.startswith("float"):
        x = x.view(torch.float32)
    return x.item() if kind.endswith("_number") else x
