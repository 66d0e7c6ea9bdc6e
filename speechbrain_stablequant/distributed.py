"""Several processes that make one plan together.

Under ``torchrun`` every process has the whole model and its share of the
calibration and search sets. All of them go through the same steps: what is
measured is put together before anything is decided, and what is known from an
earlier run is what the first process knows. In one process each function here
gives back what it was given.
"""

import atexit
import functools
import shutil
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed

Value = TypeVar("Value")

#: How long a process waits for the others, one of which writes the files.
_PATIENCE = timedelta(hours=6)


def size() -> int:
    """How many processes there are."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


def rank() -> int:
    """Which one this is; the first is 0."""
    return distributed.get_rank() if size() > 1 else 0


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def share(count: int) -> range:
    """Which of so many things are this process's.

    Example
    -------
    >>> list(share(3))
    [0, 1, 2]
    """
    return range(rank(), count, size())


@functools.cache
def _group() -> Any:
    """For objects and for tensors of any device; NCCL knows those of GPUs."""
    return distributed.new_group(backend="gloo", timeout=_PATIENCE)


def gathered(value: Value) -> list[Value]:
    """What each process has, in the order of the processes.

    Example
    -------
    >>> gathered("here")
    ['here']
    """
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    distributed.all_gather_object(values, value, group=_group())
    return values


def gathered_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors of all processes, on this one's device.

    Example
    -------
    >>> gathered_tensors(torch.zeros(1))
    [tensor([0.])]
    """
    if size() == 1:
        return [tensor]
    return [part.to(tensor.device) for part in gathered(tensor.cpu())]


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, whose tensors have the same shape; this one
    may be overwritten.

    Example
    -------
    >>> summed(torch.ones(2))
    tensor([1., 1.])
    """
    if size() > 1:
        tensor = tensor.contiguous()
        distributed.all_reduce(tensor, group=_group())
    return tensor


def from_main(value: Value) -> Value:
    """What the first process has.

    Example
    -------
    >>> from_main(3)
    3
    """
    if size() == 1:
        return value
    values = [value if is_main() else None]
    distributed.broadcast_object_list(values, src=0, group=_group())
    return values[0]


def own_folder(folder: Path) -> Path:
    """The folder itself for the first process, one of its own for each other,
    since all of them write the same and one of them for good.

    Arguments
    ---------
    folder : Path
        The output folder.

    Returns
    -------
    Path
        The others' are deleted when their process ends by itself.

    Example
    -------
    >>> own_folder(Path("results"))
    PosixPath('results')
    """
    if size() == 1:
        return folder
    # all have looked at what an earlier run left before anybody writes
    gathered(None)
    if is_main():
        return folder
    own = Path(tempfile.mkdtemp(prefix="quantize_"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own
