"""Which tile a kernel runs with: by rule, or by measurement kept on disk.

A kernel names its candidates, best guess first. Without a tuner it takes the
first. Inside ``Tuner.active()`` each new shape is measured once on the device
and the winner kept, in memory and, after ``save``, in a JSON file.

The rule estimates: a multiprocessor works off its share of the tiles one
after the other, and each takes as long as its products or its loads do.
"""

import functools
import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import triton

from ....utils.files import identity
from ....utils.store import Store
from ....utils.typed import typed
from .compare import HALF_TOLERANCE, difference

logger = logging.getLogger(__name__)

FORMAT = 1

#: Cycles that the device idles before a timed launch: 100 microseconds or so.
_AHEAD_CYCLES = 200_000

#: How many of the rule's best tiles are measured: each has to be compiled,
#: which takes a second or two.
MEASURED = 5

#: Values of a result that are compared: a large one is not copied.
_COMPARED = 1 << 22

#: int8 products that a multiprocessor finishes in a cycle, by capability.
_PRODUCTS = {(8, 0): 2048, (9, 0): 4096}
_OTHER_PRODUCTS = 1024
#: Bytes that it loads from the second-level cache in a cycle, in practice.
_LOADED_BYTES = 40


@dataclass(frozen=True)
class Limits:
    """What the rule has to know about a device.

    Arguments
    ---------
    processors : int
        Streaming multiprocessors.
    shared_bytes : int
        Shared memory that a block may have.
    products : int
        int8 products that a multiprocessor finishes in a cycle.
    """

    processors: int
    shared_bytes: int
    products: int


#: Where no device tells.
_A100 = Limits(108, 163 * 1024, 2048)
_assumed: ContextVar[Limits] = ContextVar("limits", default=_A100)


@contextmanager
def assume_limits(limits: Limits) -> Iterator[None]:
    """Context in which tiles are chosen for a device that is not there.

    Arguments
    ---------
    limits : Limits
        Of the device; on a CUDA device its own count.

    Example
    -------
    >>> with assume_limits(Limits(82, 99 * 1024, 1024)):
    ...     device_limits(torch.device("cpu")).processors
    82
    """
    token = _assumed.set(limits)
    try:
        yield
    finally:
        _assumed.reset(token)


@dataclass(frozen=True)
class Config:
    """A tile and how it is run.

    Arguments
    ---------
    block_m, block_n, block_k : int
        Rows, columns and reduction of one step.
    num_warps : int
        Warps of a block.
    num_stages : int
        Steps whose operands are in shared memory at once.
    persistent : bool
        Whether a block computes one tile after the other.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    persistent: bool = False

    def shared_bytes(self) -> int:
        """Shared memory of the int8 operands."""
        return self.num_stages * (self.block_m + self.block_n) * self.block_k


def _parse(raw: Any) -> dict[str, Config]:
    """Tiles by operator and shape, as they are remembered."""
    names = [field.name for field in fields(Config)]
    rows = typed(raw, dict[str, list[int | bool]], "content")
    return {
        key: typed(dict(zip(names, row, strict=True)), Config, key)
        for key, row in rows.items()
    }


@functools.cache
def _card_limits(index: int) -> Limits:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    return Limits(
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        _PRODUCTS.get(capability, _OTHER_PRODUCTS),
    )


def device_limits(device: torch.device) -> Limits:
    """What a device has.

    Arguments
    ---------
    device : torch.device
        Where the kernel runs; if it is no CUDA device, those of an A100 or
        of `assume_limits`.

    Returns
    -------
    Limits
    """
    if device.type != "cuda":
        return _assumed.get()
    index = device.index
    return _card_limits(torch.cuda.current_device() if index is None else index)


def shape_bucket(size: int) -> int:
    """Rounds up to 1, 1.5, 2, 3, 4, 6, 8 ... : shapes tuned as one.

    Arguments
    ---------
    size : int
        Positive.

    Returns
    -------
    int

    Example
    -------
    >>> [shape_bucket(n) for n in (1, 60, 65, 97, 250)]
    [64, 64, 96, 128, 256]
    """
    power = 64
    while power < size:
        if power * 3 // 2 >= size:
            return power * 3 // 2
        power *= 2
    return power


def rank(
    candidates: Sequence[Config],
    rows: int,
    columns: int,
    device: torch.device,
) -> list[Config]:
    """Orders candidates by rule, the one that should be fastest first.

    Arguments
    ---------
    candidates : sequence of Config
        Where two should be equally fast, the earlier one comes first.
    rows, columns : int
        Of the result.
    device : torch.device
        Where the kernel runs.

    Returns
    -------
    list of Config
        Those that fit into shared memory; at least one.

    Raises
    ------
    ValueError
        None fits.
    """
    return list(
        _ranked(tuple(candidates), rows, columns, device_limits(device))
    )


@functools.lru_cache(4096)
def _ranked(
    candidates: tuple[Config, ...], rows: int, columns: int, limits: Limits
) -> tuple[Config, ...]:
    shared = limits.shared_bytes
    fitting = [c for c in candidates if c.shared_bytes() <= shared]
    if not fitting:
        raise ValueError(
            f"no tile of this kernel fits into {shared} bytes of shared "
            "memory; use backend: torch on this device"
        )

    def cycles(config: Config) -> float:
        """Of the busiest multiprocessor, for one step of the reduction."""
        m, n = config.block_m, config.block_n
        tiles = triton.cdiv(rows, m) * triton.cdiv(columns, n)
        share = triton.cdiv(tiles, limits.processors)
        return share * max(m * n / limits.products, (m + n) / _LOADED_BYTES)

    return tuple(sorted(fitting, key=cycles))


def time_on_device(run: Callable[[], None], repeats: int = 9) -> float:
    """Milliseconds of a launch: median over device events.

    Arguments
    ---------
    run : callable
        Launches the kernel.
    repeats : int
        Launches timed, after three that are not.

    Returns
    -------
    float
        Infinity for a tile that this device cannot run.
    """
    try:
        for _ in range(3):
            run()
    except triton.OutOfResources:
        logger.debug("a tile does not fit onto this device")
        return float("inf")
    except torch.OutOfMemoryError:
        raise
    # whatever a compiler raises that cannot do one tile
    except Exception as error:
        logger.warning("a tile is left out: %s", str(error).strip())
        return float("inf")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    cache = torch.empty(
        2 * properties.L2_cache_size, dtype=torch.int8, device="cuda"
    )
    times = []
    for _ in range(repeats):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        # What goes ahead keeps the device from waiting for the host between
        # the two events, and the weights out of the cache, as in a network.
        torch.cuda._sleep(_AHEAD_CYCLES)
        cache.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


class Tuner:
    """Measures tiles and remembers the fastest.

    Arguments
    ---------
    path : str, Path or None
        JSON file of earlier measurements; None keeps them in memory only.
    device : str
        Name of the card: another card's file is refused.
    measure : callable
        Takes a function that launches, returns its time.
    store : Store or None
        Of the file's folder; one that is not private by default.

    Raises
    ------
    ValueError
        The file holds something else, or another card's measurements.
    """

    def __init__(
        self,
        path: str | Path | None,
        device: str,
        measure: Callable[[Callable[[], None]], float] = time_on_device,
        store: Store | None = None,
    ):
        self.path = None if path is None else Path(path)
        self.device = device
        self.measure = measure
        if store is None:
            store = Store(None if self.path is None else self.path.parent)
        self.store = store
        self.table = self._read()
        self._changed = False

    @property
    def _key(self) -> str:
        return identity([FORMAT, self.device, triton.__version__])

    def _read(self) -> dict[str, Config]:
        if self.path is None:
            return {}
        name = self.path.name
        tiles = self.store.read(name, self._key, "tuning cache", _parse)
        if tiles is None:
            if not self.store.private and name in self.store.names(name):
                raise ValueError(
                    f"{self.path}: not a tuning cache of {self.device} and "
                    f"Triton {triton.__version__}; delete it or name another "
                    "file"
                )
            return {}
        return tiles

    def save(self) -> None:
        """Writes new measurements beside those that others wrote meanwhile."""
        if self.path is None or not self._changed:
            return
        self._changed = False
        self.store.update(
            self.path.name,
            self._key,
            {key: list(astuple(tile)) for key, tile in self.table.items()},
            "tuning cache",
        )

    def choose(
        self,
        key: str,
        candidates: Sequence[Config],
        run: Callable[[Config], None],
        result: Callable[[], torch.Tensor] | None = None,
    ) -> Config:
        """The fastest candidate, measured at the first call for a key.

        One whose result differs from that of the first is left out.

        Arguments
        ---------
        key : str
            Kernel and bucketed shape.
        candidates : sequence of Config
            At least one.
        run : callable
            Launches the kernel with a candidate.
        result : callable, optional
            What the last launch has written.

        Returns
        -------
        Config

        Raises
        ------
        RuntimeError
            This device can run none.
        """
        known = self.table.get(key)
        # a file of an earlier version may name a tile that is gone
        if known in candidates:
            return known
        times, expected = {}, None
        for tile in _worth_measuring(candidates):
            times[tile] = self.measure(lambda tile=tile: run(tile))
            if result is None or times[tile] == float("inf"):
                continue
            if expected is None:
                expected = _sample(result()).clone()
                continue
            reason = difference(_sample(result()), expected, HALF_TOLERANCE)
            if reason is not None:
                logger.warning(
                    "%s: the result of %s %s; it is not used, please report",
                    key,
                    tile,
                    reason,
                )
                times[tile] = float("inf")
        best = min(times, key=times.get)
        if times[best] == float("inf"):
            raise RuntimeError(f"{key}: this device can run none of the tiles")
        logger.info("%s: %s, %.4f ms", key, best, times[best])
        self.table[key] = best
        self._changed = True
        return best

    @contextmanager
    def active(self) -> Iterator[None]:
        """Context in which kernels ask this tuner."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)


def _worth_measuring(candidates: Sequence[Config]) -> list[Config]:
    """The rule's best, each with all ways to run it."""
    bases = [c for c in candidates if not c.persistent][:MEASURED]
    return [c for c in candidates if replace(c, persistent=False) in bases]


def _sample(result: torch.Tensor) -> torch.Tensor:
    """Some values from all over a result; an odd step meets all columns."""
    flat = result.reshape(-1)
    return flat[:: flat.numel() // _COMPARED | 1]


_current: ContextVar[Tuner | None] = ContextVar("tuner", default=None)


def select(
    key: str,
    candidates: Sequence[Config],
    run: Callable[[Config], None],
    result: Callable[[], torch.Tensor] | None = None,
) -> Config:
    """The tile to run with.

    Arguments
    ---------
    key : str
        Kernel and bucketed shape.
    candidates : sequence of Config
        Best guess first.
    run : callable
        Launches the kernel with a candidate.
    result : callable, optional
        What the last launch has written: the same with every candidate.

    Returns
    -------
    Config
        The tuner's choice if one is active, else the first.
    """
    tuner = _current.get()
    if tuner is None or len(candidates) == 1:
        return candidates[0]
    return tuner.choose(key, candidates, run, result)
