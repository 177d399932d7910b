"""What a step needs, made ahead of time in the background."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

Result = TypeVar("Result")


class Prefetch(Generic[Result]):
    """The results of `make(step)` for step = start, ..., stop - 1, each made before it is asked for.

    A context manager. One thread calls `make`, step after step, and is never more than `ahead` results ahead
    of those that were asked for; with `ahead = 0` there is no thread, and `get` calls `make`. Leaving the
    context waits for the call that is under way and makes no more.
    """

    def __init__(self, make: Callable[[int], Result], start: int, stop: int, ahead: int):
        self._make, self._next, self._stop, self._ahead = make, start, stop, ahead
        self._to_make = iter(range(start, stop))
        self._waiting: deque[Future[Result]] = deque()

    def __enter__(self) -> Self:
        if self._ahead:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
            for _ in range(self._ahead):
                self._make_next()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ahead:
            self._thread.shutdown(cancel_futures=True)

    def get(self, step: int) -> Result:
        """The result of `step`; the steps are asked for in order. Raises what `make` raised for it."""
        assert step == self._next < self._stop, (step, self._next, self._stop)
        self._next += 1
        if not self._ahead:
            return self._make(step)
        result = self._waiting.popleft()
        self._make_next()
        return result.result()

    def _make_next(self) -> None:
        step = next(self._to_make, None)
        if step is not None:
            self._waiting.append(self._thread.submit(self._make, step))
