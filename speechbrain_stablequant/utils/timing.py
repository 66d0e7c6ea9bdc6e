"""Time of computing, told apart from that of getting ready."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Preparation:
    """Seconds that runtimes spent on getting ready, not on computing.

    Some compile when a length is first met, and keep the result. What is
    spent so is counted here, for whoever takes the time of a forward pass.

    Arguments
    ---------
    seconds : float
        Since the process began.

    Example
    -------
    >>> preparation = Preparation()
    >>> with preparation.running():
    ...     sum(range(1000))
    499500
    >>> preparation.seconds > 0
    True
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(
        self, wait: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """Context of what is not computing.

        Arguments
        ---------
        wait : callable
            Waits for a device to finish, before and after.
        """
        wait()
        start = time.perf_counter()
        try:
            yield
        finally:
            wait()
            self.seconds += time.perf_counter() - start


#: Of this process.
PREPARATION = Preparation()


class BatchTimes:
    """Takes the time of batches, without what was prepared in them.

    Arguments
    ---------
    wait : callable
        Waits for a device to finish, before and after a batch.

    Example
    -------
    >>> times = BatchTimes()
    >>> for _ in range(3):
    ...     with times.batch():
    ...         pass
    >>> len(times.counted(times.seconds))
    2
    """

    def __init__(self, wait: Callable[[], None] = lambda: None):
        self.wait = wait
        self.seconds: list[float] = []

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Context of one batch; nothing is noted of one that fails."""
        self.wait()
        prepared = PREPARATION.seconds
        start = time.perf_counter()
        yield
        self.wait()
        seconds = time.perf_counter() - start
        self.seconds.append(seconds - PREPARATION.seconds + prepared)

    @staticmethod
    def counted(values: list[float]) -> list[float]:
        """Of values by batch those that count: where there are others, not
        the first, which loads libraries and allocates."""
        return values[1:] or values
