"""Which tile a kernel runs with: the estimate's, or a measured one.

A kernel lists its candidates, best guess first. Without a tuner it takes the
first. Inside ``Tuner.active()`` a new shape is tried once on the device: a tile
is used only after its result there equaled the exact one, and the fastest of
these is kept, in memory and, after ``save``, in a JSON file.
"""

import logging
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import astuple, fields
from typing import Any

import torch
import triton

from ....utils.files import identity
from ....utils.store import Store
from ....utils.typed import typed
from .plain import difference
from .tiles import Config

logger = logging.getLogger(__name__)

FORMAT = 2

#: Idle cycles of the device before a timed launch: about 100 microseconds.
_AHEAD_CYCLES = 200_000

#: Outlines that are measured, and then the other forms of the fastest one:
#: compiling each takes a second or two.
MEASURED = 6

#: Values of a result that are compared, to save memory; at least one entry.
_COMPARED = 1 << 22

_WRONG = "%s: the result of %s %s; it is not used, please report"

#: What is wrong with the last result, or None.
Check = Callable[[], str | None]


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
        return math.inf
    except torch.OutOfMemoryError:
        raise
    # A compiler that cannot compile one tile may raise anything.
    except Exception as error:
        logger.warning("a tile is left out: %s", str(error).strip())
        return math.inf
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
    """Tries tiles and remembers the fastest in a file of a store, or with
    ``tune`` False the first that is right; a file of another card, given by
    name, is refused."""

    def __init__(
        self,
        store: Store,
        name: str,
        card: str,
        measure: Callable[[Callable[[], None]], float] = time_on_device,
        tune: bool = True,
    ):
        self.store = store
        self.name = name
        self.measure = measure
        self.tune = tune
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
        check: Check | None = None,
    ) -> Config:
        """The fastest candidate with a right result, tried at the first call
        for a key; see `select`."""
        known = self.table.get(key)
        # a file of an earlier version may hold a tile that no longer exists
        if known in candidates:
            return known
        times: dict[Config, float] = {}

        def best_of(tiles: Iterable[Config]) -> Config:
            for tile in tiles:
                times[tile] = self.measure(lambda tile=tile: run(tile))
                reason = times[tile] < math.inf and check and check()
                if reason:
                    times[tile] = math.inf
                    logger.warning(_WRONG, key, tile, reason)
                if not self.tune and times[tile] < math.inf:
                    break
            return min(times, key=times.get)

        if self.tune:
            forms: dict[tuple[int, ...], list[Config]] = {}
            for tile in candidates:
                forms.setdefault(tile.outline, []).append(tile)
            leaders = [group[0] for group in forms.values()][:MEASURED]
            best = best_of(forms[best_of(leaders).outline][1:])
        else:
            best = best_of(candidates)
        if times[best] == math.inf:
            raise RuntimeError(
                f"{key}: this device runs none of the tiles correctly; write "
                "backend: torch"
            )
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


def compared(
    out: torch.Tensor,
    reference: Callable[[torch.Tensor], torch.Tensor],
    tolerance: float = 1e-5,
    part: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> Check:
    """A check of ``out`` against ``reference(entries)`` at evenly spaced
    entries of its first axis, the last among them; ``part`` of each is
    compared."""
    expected: list[torch.Tensor] = []

    def check() -> str | None:
        count = min(len(out), _COMPARED // max(out[0].numel(), 1))
        last = len(out) - 1
        entries = torch.linspace(last, 0, max(count, 1), device=out.device)
        entries = entries.long()
        if not expected:
            expected.append(part(reference(entries)))
        return difference(part(out[entries]), *expected, tolerance)

    return check


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
    check: Check | None = None,
) -> Config:
    """The tile to run with: the active tuner's choice, else the first of the
    candidates. ``run`` launches the kernel with a tile; ``check`` says what is
    wrong with what the last launch wrote. Without either, no tile of a kernel
    that only a trial proves is taken."""
    tuner = _current.get()
    if tuner is None or check is None:
        candidates = [tile for tile in candidates if not tile.gluon]
    if tuner is None:
        return candidates[0]
    return tuner.choose(key, candidates, run, check)
