"""Work ahead of and behind a loop, in a thread each, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(function: Callable[[T], R], items: Iterable[T], depth: int) -> Iterator[R]:
    """`map`, computed up to `depth` items ahead of the consumer; 0 is plain `map`. Errors arise in their turn."""
    if depth == 0:
        yield from map(function, items)
        return
    pool, pending = ThreadPoolExecutor(1, "ahead"), deque[Future[R]]()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def behind(function: Callable[[T], object], depth: int) -> Iterator[Callable[[T], object]]:
    """A function that calls `function` later, in order, with at most `depth` calls outstanding; 0 calls it at once.

    All calls are done when the block ends; the first that failed raises there, or at a later call.
    """
    if depth == 0:
        yield function
        return
    pool, pending = ThreadPoolExecutor(1, "behind"), deque[Future[object]]()

    def put(item: T) -> None:
        if len(pending) >= depth:
            pending.popleft().result()
        pending.append(pool.submit(function, item))

    try:
        yield put
        while pending:
            pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
