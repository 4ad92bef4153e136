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

    The first error ends the iteration, with a note that names the item by its index; so does closing it.
    """
    source = iter(items)
    pending: deque[Future[Result]] = deque(threads.submit(work, item) for item in islice(source, at_once))
    try:
        for index in count():
            if not pending:
                return
            try:
                result = pending.popleft().result()
            except Exception as error:
                error.add_note(f"at index {index} of the photos")
                raise
            pending.extend(threads.submit(work, item) for item in islice(source, 1))
            yield result
    finally:
        for future in pending:
            future.cancel()
