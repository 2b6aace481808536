"""How the rows of a run, prompts times methods, are put into groups that are evaluated as a whole.

Above `batch_size=1` rows run beside others, and their numbers depend on these by rounding. So a group is always the
same rows, whatever of it was finished before: a run that was cut off ends with the numbers of an undisturbed one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from griffin import Method

Item = TypeVar("Item")

# Batches that a group of generated texts has at least: rows that end early make room for others of their group.
BATCHES = 4


def groups(items: Sequence[Item], methods: Sequence[Method], batch_size: int, batches: int = 1) -> Iterator[list[Item]]:
    """The items in groups of at least so many batches of rows; one by one where rows run alone.

    Args:
        items: prompts or other items, each a row under every method.
        methods: all methods of the call.
        batch_size: rows at a time.
        batches: how many batches of rows a group has.
    """
    size = 1 if batch_size == 1 else max(1, -(-batches * batch_size // len(methods)))
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
