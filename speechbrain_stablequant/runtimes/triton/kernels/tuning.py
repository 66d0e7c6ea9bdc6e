"""Which tile a kernel runs with: the estimate's, or a measured one.

A kernel lists its candidates, best guess first. Without a tuner it takes the
first. Inside ``Tuner.active()`` each new shape is measured once on the device
and the fastest kept, in memory and, after ``save``, in a JSON file.
"""

import logging
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import astuple, fields, replace
from typing import Any

import torch
import triton

from ....utils.files import identity
from ....utils.store import Store
from ....utils.typed import typed
from .plain import HALF_TOLERANCE, difference
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
    """Measures tiles and remembers the fastest in a file of a store; a file of
    another card, given by name, is refused."""

    def __init__(
        self,
        store: Store,
        name: str,
        card: str,
        measure: Callable[[Callable[[], None]], float] = time_on_device,
    ):
        self.store = store
        self.name = name
        self.measure = measure
        self._key = identity([FORMAT, card, triton.__version__])
        self._changed = False
        self.table = store.read(name, self._key, "tuning cache", _parse) or {}
        foreign = not self.table and name in store.names(name)
        if foreign and not store.private:
            raise ValueError(
                f"{store.folder / name}: not a tuning cache of {card} and "
                f"Triton {triton.__version__}; delete it or name another file"
            )

    def save(self) -> None:
        """Writes new measurements; keeps those that other processes wrote."""
        if self._changed:
            self._changed = False
            table = {key: list(astuple(t)) for key, t in self.table.items()}
            self.store.update(self.name, self._key, table, "tuning cache")

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


def tuning_key(
    kernel: str, sizes: Iterable[int], switches: Iterable[bool], *dtypes
) -> str:
    """Key of a measured tile, such as ``linear/96x1024x512/010/int8``."""
    size = "x".join(map(str, sizes))
    switched = "".join(str(int(switch)) for switch in switches)
    parts = (kernel, size, switched, *map(str, dtypes))
    return "/".join(filter(None, parts)).replace("torch.", "")


def select(
    key: str,
    candidates: Sequence[Config],
    run: Callable[[Config], None],
    result: Callable[[], torch.Tensor] | None = None,
) -> Config:
    """The tile to run with: the active tuner's choice, else the first of the
    candidates. ``run`` launches the kernel with a tile; ``result`` returns what
    the last launch wrote, the same for every tile."""
    tuner = _current.get()
    if tuner is None or len(candidates) == 1:
        return candidates[0]
    return tuner.choose(key, candidates, run, result)
