"""Which tile a kernel runs with: the estimate's, or a measured one.

A kernel lists its candidates, best guess first. Without a tuner it takes the
first. Inside ``Tuner.active()`` each new shape is measured once on the device
and the fastest kept, in memory and, after ``save``, in a JSON file.
"""

import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import astuple, fields, replace
from pathlib import Path
from typing import Any

import torch
import triton

from ....utils.files import identity
from ....utils.store import Store
from ....utils.typed import typed
from .compare import HALF_TOLERANCE, difference
from .tiles import Config

logger = logging.getLogger(__name__)

FORMAT = 1

#: Idle cycles of the device before a timed launch: about 100 microseconds.
_AHEAD_CYCLES = 200_000

#: Candidates that are measured: compiling each takes a second or two.
MEASURED = 5

#: Largest number of values of a result that are compared, to save memory.
_COMPARED = 1 << 22


def _parse(raw: Any) -> dict[str, Config]:
    """Tiles by operator and shape, from their JSON form."""
    names = [field.name for field in fields(Config)]
    rows = typed(raw, dict[str, list[int | bool]], "content")
    return {
        key: typed(dict(zip(names, row, strict=True)), Config, key)
        for key, row in rows.items()
    }


def time_on_device(run: Callable[[], None], repeats: int = 9) -> float:
    """Median milliseconds of a launch; infinity if the device cannot run it."""
    try:
        for _ in range(3):
            run()
    except triton.OutOfResources:
        logger.debug("a tile does not fit onto this device")
        return float("inf")
    except torch.OutOfMemoryError:
        raise
    # A compiler that cannot compile one tile may raise anything.
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
        # The sleep keeps the device from waiting for the host between the two
        # events; the fill flushes the weights from the cache, as a network
        # would.
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
        Name of the card; a file of another card is refused.
    measure : callable
        Takes a function that launches a kernel, returns its time.
    store : Store or None
        Store of the file's folder; by default a public one.

    Raises
    ------
    ValueError
        The file is no tuning cache, or another card's.
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
        """Writes new measurements; keeps those that other processes wrote."""
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
        """The fastest candidate, measured at the first call for a key; see
        `select`. Skips candidates whose result differs from the first's."""
        known = self.table.get(key)
        # a file of an earlier version may hold a tile that no longer exists
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
        """Context in which `select` asks this tuner."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)


def _worth_measuring(candidates: Sequence[Config]) -> list[Config]:
    """The first candidates, each with its persistent form if there is one."""
    bases = [c for c in candidates if not c.persistent][:MEASURED]
    return [c for c in candidates if replace(c, persistent=False) in bases]


def _sample(result: torch.Tensor) -> torch.Tensor:
    """Evenly spaced values; the step is odd so that all columns are sampled."""
    flat = result.reshape(-1)
    return flat[:: flat.numel() // _COMPARED | 1]


_current: ContextVar[Tuner | None] = ContextVar("tuner", default=None)


def select(
    key: str,
    candidates: Sequence[Config],
    run: Callable[[Config], None],
    result: Callable[[], torch.Tensor] | None = None,
) -> Config:
    """The tile to run with: the active tuner's choice, else the first.

    Arguments
    ---------
    key : str
        Kernel and bucketed shape.
    candidates : sequence of Config
        Best guess first.
    run : callable
        Launches the kernel with a candidate.
    result : callable, optional
        Returns what the last launch wrote; the same for every candidate.

    Returns
    -------
    Config
    """
    tuner = _current.get()
    if tuner is None or len(candidates) == 1:
        return candidates[0]
    return tuner.choose(key, candidates, run, result)
