"""Several processes that make one plan together.

Under ``torchrun`` every process has the whole model and its share of the data.
All run the same steps: measurements are gathered before each decision, and the
first process decides what is known from an earlier run.
"""

import atexit
import functools
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import distributed

from .files import process_is_alive, process_place
from .typed import one_line

Value = TypeVar("Value")

#: How long a process waits for the others, one of which writes the files. One
#: that ends closes its connections, which the others notice at once.
_PATIENCE = timedelta(hours=6)


class LostProcessError(SystemExit):
    """Ends this process, with one line or silently, as another has ended."""


class _Peer(NamedTuple):
    """A process of the group."""

    rank: int
    place: str
    pid: int
    launcher: int

    @classmethod
    def this(cls) -> "_Peer":
        """The calling process."""
        parts = process_place(), os.getpid(), os.getppid()
        return cls(distributed.get_rank(), *parts)

    def has_ended(self) -> bool:
        """Whether this process of the same machine is gone or a zombie."""
        if not process_is_alive(self.pid):
            return True
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] in "ZX"


def size() -> int:
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


def rank() -> int:
    """Rank of this process."""
    return distributed.get_rank() if size() > 1 else 0


def is_main() -> bool:
    return rank() == 0


def share(count: int) -> range:
    """Indices of this process among ``count`` items."""
    return range(rank(), count, size())


@functools.cache
def _group() -> Any:
    """A gloo group: it takes objects, and tensors of any device."""
    return distributed.new_group(backend="gloo", timeout=_PATIENCE)


@functools.cache
def _peers() -> list[_Peer]:
    """All processes, by rank."""
    peers: list[Any] = [None] * size()
    distributed.all_gather_object(peers, _Peer.this(), group=_group())
    return peers


def _ended(peers: list[_Peer]) -> list[_Peer]:
    """Waits for processes of this machine to end and returns those that did."""
    # A process closes its connections shortly before it is gone.
    until = time.monotonic() + 2.0
    while True:
        ended = [peer for peer in peers if peer.has_ended()]
        if ended or time.monotonic() > until:
            return ended
        time.sleep(0.02)


def _is_first_to_tell(mine: _Peer, peers: list[_Peer]) -> bool:
    """Whether no process of this launcher has reported the loss yet."""
    shared = (mine.place, mine.launcher)
    siblings = [p for p in peers if (p.place, p.launcher) == shared]
    pids = "-".join(str(peer.pid) for peer in siblings)
    marker = Path(tempfile.gettempdir()) / f"quantize_lost_{pids}"

    def clean() -> None:
        # Others notice late, when this one's connections are closed.
        if all(peer == mine or peer.has_ended() for peer in siblings):
            marker.unlink(missing_ok=True)

    atexit.register(clean)
    try:
        marker.touch(exist_ok=False)
    except OSError as error:
        return not isinstance(error, FileExistsError)
    return True


def _loss_line(mine: _Peer, peers: list[_Peer], error: RuntimeError) -> str:
    """The message: which processes are lost, and how to continue."""
    near = [p for p in peers if p.place == mine.place and p != mine]
    far = {peer.place[0] for peer in peers if peer.place != mine.place}
    who = "; ".join(
        f"rank {peer.rank} (process {peer.pid} on {peer.place[0]})"
        for peer in _ended(near)
    )
    if not who:
        reason = str(error).partition("\n")[0]
        who = f"one on {', '.join(sorted(far)) or 'this machine'} ({reason})"
    return (
        f"quantize: lost of {size()} processes: {who}; start the same command "
        "again, and the run goes on from its journal"
    )


@contextmanager
def loss_in_one_line(only_collectives: bool = False) -> Iterator[None]:
    """Raises LostProcessError, in one line, when another process has ended.

    With ``only_collectives`` every RuntimeError inside counts as such a loss.
    """
    peers: list[_Peer] = []
    try:
        if size() > 1:
            peers = _peers()
        yield
    except RuntimeError as error:
        lost = only_collectives or isinstance(error, distributed.DistError)
        if size() == 1 or not (lost or "gloo" in str(error)):
            raise
        if threading.current_thread() is threading.main_thread():
            # torchrun ends the other processes of the machine meanwhile.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        mine = _Peer.this()
        first = _is_first_to_tell(mine, peers)
        status = _loss_line(mine, peers, error) if first else 1
        raise LostProcessError(status) from None


def gathered(value: Value) -> list[Value]:
    """Returns the value of each process, by rank."""
    values: list[Any] = [value] * size()
    if size() > 1:
        with loss_in_one_line(only_collectives=True):
            distributed.all_gather_object(values, value, group=_group())
    return values


def gathered_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Returns the tensors of all processes, on this one's device."""
    if size() == 1:
        return [tensor]
    return [part.to(tensor.device) for part in gathered(tensor.cpu())]


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """Sums a tensor over all processes; may overwrite its argument."""
    if size() > 1:
        tensor = tensor.contiguous()
        with loss_in_one_line(only_collectives=True):
            distributed.all_reduce(tensor, group=_group())
    return tensor


def together(
    attempt: Callable[..., Value],
) -> Callable[..., Value]:
    """Makes a function fail in all processes if it fails in one."""

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
    """Returns the value of the first process."""
    if size() == 1:
        return value
    values = [value if is_main() else None]
    with loss_in_one_line(only_collectives=True):
        distributed.broadcast_object_list(values, src=0, group=_group())
    return values[0]


def own_folder(folder: Path) -> Path:
    """Returns the folder; a temporary one in all processes but the first."""
    if size() == 1:
        return folder
    # Nobody writes before all have read what an earlier run left.
    gathered(None)
    if is_main():
        return folder
    own = Path(tempfile.mkdtemp(prefix="quantize_"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own
