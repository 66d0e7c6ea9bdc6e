"""Computing time, without the time of preparation."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Preparation:
    """Seconds spent on preparation such as compiling, which timers subtract."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(
        self, wait: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """Context of preparation; ``wait`` waits for a device around it."""
        wait()
        start = time.perf_counter()
        try:
            yield
        finally:
            wait()
            self.seconds += time.perf_counter() - start


PREPARATION = Preparation()  #: the counter of this process


class BatchTimes:
    """Times batches, without the preparation inside them."""

    def __init__(self, wait: Callable[[], None] = lambda: None):
        self.wait = wait
        self.seconds: list[float] = []

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Context of one batch; a batch that fails is not recorded."""
        self.wait()
        prepared = PREPARATION.seconds
        start = time.perf_counter()
        yield
        self.wait()
        seconds = time.perf_counter() - start
        self.seconds.append(seconds - PREPARATION.seconds + prepared)

    @staticmethod
    def counted(values: list[float]) -> list[float]:
        """Drops the first of several values: it includes loading."""
        return values[1:] or values
