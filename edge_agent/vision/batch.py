"""Work on many items, some at once, with the results in the order of the items."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from itertools import count, islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    threads: Executor, work: Callable[[Item], Result], items: Iterable[Item], at_once: int
) -> Iterator[Result]:
    """Results of `work`, with up to `at_once` items under way. Items are taken as they are needed.

    The first error ends the iteration, with a note that names the item by its index; so does closing it. An error of
    `items` itself comes after the results of the items before it.
    """
    started = started_one_by_one(threads, work, items)
    pending = deque(islice(started, at_once))
    try:
        for index in count():
            if not pending:
                return
            try:
                result = pending.popleft().result()
            except Exception as error:
                error.add_note(f"at index {index} of the photos")
                raise
            pending.extend(islice(started, 1))
            yield result
    finally:
        for future in pending:
            future.cancel()


def started_one_by_one(
    threads: Executor, work: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Future[Result]]:
    """The work on each item, and last the error of `items` or of `threads`, if there is one."""
    try:
        for item in items:
            yield threads.submit(work, item)
    except Exception as error:
        failed: Future[Result] = Future()
        failed.set_exception(error)
        yield failed
