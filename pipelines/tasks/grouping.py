"""How the rows of a run, prompts times methods, are put into groups that are evaluated as a whole.

Above `batch_size=1` rows run beside others, and their numbers depend on these by rounding. So a group is always the
same rows, whatever of it was finished before: a run that was cut off ends with the numbers of an undisturbed one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import griffin
from griffin import Method, PromptState, Row
from pipelines.config import RunConfig

Item = TypeVar("Item", bound=Any)  # with an `index`, as samples have
Done = dict[Method, set[int]]

# Batches that a group of generated texts has at least: only the last one of a group may have fewer rows.
BATCHES = 4


def groups(
    items: Sequence[Item],
    methods: Sequence[Method],
    config: RunConfig,
    done: Done,
    batches: int = 1,
    size: int | None = None,
) -> Iterator[tuple[list[Item], Sequence[Method]]]:
    """The items in groups of at least so many batches of rows, one by one where rows run alone; and the methods that
    run with a group. A group whose samples are all there is left out.

    Args:
        items: prompts or other items, each a row under every method.
        methods: all methods of the call.
        config: of the call.
        done: of each method, the indices of the items that it has samples of.
        batches: how many batches of rows a group has; one, of one method, where experts are shared.
        size: of a group, where it does not follow from the batch size.
    """
    shared, rows = config.shared_experts, config.batch_size
    size = size or (rows if shared or rows == 1 else max(1, -(-batches * rows // len(methods))))
    for start in range(0, len(items), size):
        group = list(items[start : start + size])
        needed = [method for method in methods if any(item.index not in done[method] for item in group)]
        if needed:
            yield group, needed if shared or rows == 1 else methods


def begun(
    engine: griffin.Engine,
    items: Sequence[Item],
    methods: Sequence[Method],
    config: RunConfig,
    prefilled: Callable[[Item], PromptState],
) -> Iterator[tuple[Iterator[Row], int]]:
    """The rows of a group, and how many of them run at a time: each prompt runs when there is room for its first row.

    Where experts are shared the rows of one method are together.

    Args:
        engine: the model.
        items: of a group; they label their rows.
        methods: that run with it.
        config: of the call.
        prefilled: an item's prompt, after it has run dense.
    """
    if not config.shared_experts:
        states = ((item, prefilled(item)) for item in items)
        pairs = ((item, state, method) for item, state in states for method in methods)
        rows = (griffin.begin(engine, [state], method, config.seed, [item])[0] for item, state, method in pairs)
        yield rows, config.batch_size
        return
    together = [prefilled(item) for item in items]
    for method in methods:
        yield iter(griffin.begin(engine, together, method, config.seed, items)), len(items)
