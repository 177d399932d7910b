"""Steps' data made ahead of time in a background thread."""

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")
_POLL_S = 0.1  # how long a blocked thread takes to notice that nobody wants its results any more


class Prefetch(Generic[T]):
    """`make(step)` for step = start, ..., stop - 1, up to `ahead` results before they are asked for.

    A context manager. `make` is called in the order of the steps, in one thread of its own; with `ahead = 0`
    in place, when its result is asked for. What it raises is raised by `get` of that step.
    """

    def __init__(self, make: Callable[[int], T], start: int, stop: int, ahead: int):
        self._make, self._next, self._stop, self._ahead = make, start, stop, ahead
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Prefetch[T]":
        if self._ahead:
            self._results: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(self._ahead)
            self._thread = threading.Thread(target=self._run, args=(self._next,), daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def get(self, step: int) -> T:
        """The result of `step`; steps must be asked for in order."""
        assert step == self._next, (step, self._next)
        self._next += 1
        if self._thread is None:
            return self._make(step)
        result, error = self._results.get()
        if error is not None:
            raise error
        return result

    def _run(self, step: int) -> None:
        while step < self._stop and not self._ended.is_set():
            try:
                item = (self._make(step), None)
            except BaseException as error:
                item, step = (None, error), self._stop
            while not self._ended.is_set():
                try:
                    self._results.put(item, timeout=_POLL_S)
                    break
                except queue.Full:
                    pass
            step += 1
