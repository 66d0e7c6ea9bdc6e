"""Several processes that make one plan together.

Under ``torchrun`` every process has the whole model and its share of the
calibration and search sets. All of them go through the same steps: what is
measured is put together before anything is decided, and what is known from an
earlier run is what the first process knows. In one process each function here
gives back what it was given.
"""

import atexit
import functools
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed

from .typed import one_line

Value = TypeVar("Value")

#: How long a process waits for the others, one of which writes the files. One
#: that ends closes its connections, which the others notice at once.
_PATIENCE = timedelta(hours=6)


class LostProcessError(SystemExit):
    """Another process has ended: this one ends as well, with one line or, where
    another process of the same launcher has said it, without."""


@dataclass(frozen=True)
class _Peer:
    """A process of the group."""

    rank: int
    host: str
    namespace: str
    pid: int
    launcher: int

    @classmethod
    def this(cls) -> "_Peer":
        """The one that asks."""
        try:
            namespace = os.readlink("/proc/self/ns/pid")
        except OSError:
            namespace = ""
        return cls(
            distributed.get_rank(),
            socket.gethostname(),
            namespace,
            os.getpid(),
            os.getppid(),
        )

    def sees(self, other: "_Peer") -> bool:
        """Whether the other's process number means something to this one."""
        here, there = (self.host, self.namespace), (other.host, other.namespace)
        return here == there

    def has_ended(self) -> bool:
        """Whether this process, of the same machine, is gone or a zombie."""
        try:
            os.kill(self.pid, 0)
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] in "ZX"


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


@functools.cache
def _peers() -> list[_Peer]:
    """All processes, by rank."""
    peers: list[Any] = [None] * size()
    distributed.all_gather_object(peers, _Peer.this(), group=_group())
    return peers


def _lost(mine: _Peer, peers: list[_Peer], seconds: float = 2.0) -> list[_Peer]:
    """Those that ended, as far as this machine can tell. A process closes its
    connections shortly before it is gone."""
    others = [peer for peer in peers if peer != mine and mine.sees(peer)]
    until = time.monotonic() + seconds
    while True:
        ended = [peer for peer in others if peer.has_ended()]
        if ended or time.monotonic() > until:
            return ended
        time.sleep(0.02)


def _is_first_to_tell(mine: _Peer, peers: list[_Peer]) -> bool:
    """Whether no process of this launcher has told the loss: one line each."""
    siblings = [
        peer
        for peer in peers
        if mine.sees(peer) and peer.launcher == mine.launcher
    ]
    pids = "-".join(str(peer.pid) for peer in siblings)
    marker = Path(tempfile.gettempdir()) / f"quantize_lost_{pids}"

    def clean() -> None:
        # Others notice late, when this one's connections are closed.
        if all(peer == mine or peer.has_ended() for peer in siblings):
            marker.unlink(missing_ok=True)

    atexit.register(clean)
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def _loss_line(
    mine: _Peer, peers: list[_Peer], ended: list[_Peer], reason: str
) -> str:
    """Which processes are lost, and how to go on."""
    if ended:
        who = "; ".join(
            f"rank {peer.rank} (process {peer.pid} on {peer.host})"
            for peer in ended
        )
    else:
        hosts = sorted({p.host for p in peers if not mine.sees(p)})
        who = f"one on {', '.join(hosts) or 'this machine'} ({reason})"
    return (
        f"quantize: lost of {size()} processes: {who}; start the same command "
        "again, and the run goes on from its journal"
    )


def _is_loss(error: RuntimeError) -> bool:
    """Whether an error of anything says that a connection broke."""
    return isinstance(error, distributed.DistError) or "gloo" in str(error)


@contextmanager
def loss_in_one_line(only_collectives: bool = False) -> Iterator[None]:
    """Ends this process with one line when another one has ended.

    Arguments
    ---------
    only_collectives : bool
        Whether every RuntimeError within is one of a collective operation.

    Raises
    ------
    LostProcessError
        Says which process, and how to go on.

    Example
    -------
    >>> with loss_in_one_line():
    ...     pass
    """
    peers: list[_Peer] = []
    try:
        if size() > 1:
            peers = _peers()
        yield
    except RuntimeError as error:
        if size() == 1 or not (only_collectives or _is_loss(error)):
            raise
        if threading.current_thread() is threading.main_thread():
            # torchrun ends the other processes of the machine meanwhile.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        mine = _Peer.this()
        if not _is_first_to_tell(mine, peers):
            raise LostProcessError(1) from None
        ended = _lost(mine, peers)
        reason = str(error).partition("\n")[0]
        raise LostProcessError(_loss_line(mine, peers, ended, reason)) from None


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
    with loss_in_one_line(only_collectives=True):
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
        with loss_in_one_line(only_collectives=True):
            distributed.all_reduce(tensor, group=_group())
    return tensor


def together(
    attempt: Callable[..., Value],
) -> Callable[..., Value]:
    """A function that fails in all processes if it fails in one, so that all
    of them go on in the same way.

    Arguments
    ---------
    attempt : callable
        Called by all processes.

    Returns
    -------
    callable

    Example
    -------
    >>> together(abs)(-1)
    1
    """

    @functools.wraps(attempt)
    def joined(*args: Any, **kwargs: Any) -> Value:
        value, failure = None, None
        try:
            value = attempt(*args, **kwargs)
        # Raised below, when the others know of it.
        except Exception as error:
            failure = error
        reasons = gathered(failure and one_line(failure, 400))
        if failure is not None:
            raise failure
        for process, reason in enumerate(reasons):
            if reason is not None:
                raise ValueError(f"{reason} (in process {process})")
        return value

    return joined


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
    with loss_in_one_line(only_collectives=True):
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
