"""Queries and what answers them: a session on feeds of the wanted batch, or several sessions at the same time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue

import numpy as np

from deploycc.core.artifact import Feeds
from deploycc.core.contract import Session
from deploycc.errors import BenchError
from deploycc.runtime.measure import Call
from deploycc.runtime.signature import Signature

MOST_BATCHES = 8  # of one size are kept to take turns over


def batched(feeds: Sequence[Feeds], signature: Signature, batch: int, name: str) -> list[Feeds]:
    """Feeds of `batch` samples each, real ones in turn.

    Raises:
        BenchError: the model's first axes are fixed to another size.
    """
    if all(array.shape[:1] == (batch,) for item in feeds for array in item.values()):
        return list(feeds)
    fixed = [spec for spec in signature.inputs if not spec.shape or (spec.shape[0] != batch and isinstance(spec.shape[0], int))]
    if fixed:
        free = "x".join(["N", *map(str, fixed[0].shape[1:])])
        raise BenchError(
            f"'{name}' cannot take batches of {batch}: its input is {fixed[0]}",
            fix=f"capture the model with a free batch axis (--input {fixed[0].name}:{free}), or bench it at its own batch size",
        )
    rows = [{key: array[index : index + 1] for key, array in item.items()} for item in feeds for index in range(_batch_of(item))]
    count = min(MOST_BATCHES, len(rows))
    return [
        {key: np.concatenate([rows[(start + step) % len(rows)][key] for step in range(batch)]) for key in rows[0]} for start in range(count)
    ]


def _batch_of(feeds: Feeds) -> int:
    """Samples in one call: the first axis that all inputs share, else 1."""
    sizes = {array.shape[0] if array.ndim else 1 for array in feeds.values()}
    return sizes.pop() if len(sizes) == 1 else 1


def batch_of(feeds: Feeds) -> int:
    """Samples in one call, at least 1."""
    return max(1, _batch_of(feeds))


def call_of(session: Session, feeds: Sequence[Feeds], *, wait: bool = True) -> Call:
    """One call on the next of `feeds`; with `wait`, until its work is finished."""
    run, synchronize, count = session.run, session.synchronize, len(feeds)
    if not wait:
        return lambda index: run(feeds[index % count])

    def call(index: int) -> None:
        run(feeds[index % count])
        synchronize()

    return call


class Crew:
    """Sessions that work at the same time, a thread each, on one queue of call numbers; a context manager.

    `done` gets (number, nanoseconds of the clock when it was finished, what it raised or None) for every number put into `todo`.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self.todo: SimpleQueue[int | None] = SimpleQueue()
        self.done: SimpleQueue[tuple[int, int, BaseException | None]] = SimpleQueue()
        self.finished: Callable[[int], None] | None = None
        self._threads = [threading.Thread(target=self._work, args=(call,), daemon=True) for call in calls]

    @property
    def size(self) -> int:
        """How many work at the same time."""
        return len(self._threads)

    def __enter__(self) -> Crew:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        for _ in self._threads:
            self.todo.put(None)
        for thread in self._threads:
            thread.join()

    def query(self, number: int) -> None:
        """As many calls as there are sessions, at the same time, until the last is finished. Raises what one of them raised."""
        for index in range(self.size):
            self.todo.put(number * self.size + index)
        self.wait(self.size)

    def wait(self, count: int) -> list[tuple[int, int]]:
        """(number, moment) of the next `count` that finish. Raises what one of them raised, after all have finished."""
        found = [self.done.get() for _ in range(count)]
        for _, _, error in found:
            if error is not None:
                raise error
        return [(number, moment) for number, moment, _ in found]

    def _work(self, call: Call) -> None:
        while (number := self.todo.get()) is not None:
            error: BaseException | None = None
            try:
                call(number)
            except BaseException as caught:  # noqa: BLE001  (handed to the thread that asked)
                error = caught
            moment = time.perf_counter_ns()
            if self.finished is not None:
                self.finished(number)
            self.done.put((number, moment, error))
