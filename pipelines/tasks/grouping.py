"""The rows of a run, prompts times methods, and how they are put into groups that are evaluated as a whole.

Above `batch_size=1` rows run beside others, and their numbers depend on these by rounding. So a group is always the
same rows, whatever of it was finished before: a run that was cut off ends with the numbers of an undisturbed one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import griffin
from griffin import Method, PromptState, Row
from pipelines.config import RunConfig
from pipelines.methods import engine_for
from pipelines.records import Sample

if TYPE_CHECKING:
    from pipelines.models import LoadedModel

Item = TypeVar("Item", bound=Any)  # with an `index`, as samples have
Batches = Generator[tuple[Method, list[Sample]], None, None]

# Batches that a group of generated texts has at least: only the last one of a group may have fewer rows.
BATCHES = 4


@dataclass(frozen=True)
class Evaluation:
    """What a call evaluates on one model.

    Attributes:
        methods: all methods of the call.
        done: of each method, the indices of the items that it has samples of.
    """

    loaded: LoadedModel
    config: RunConfig
    methods: Sequence[Method]
    done: dict[Method, set[int]]

    @cached_property
    def engine(self) -> griffin.Engine:
        """The model, for these methods."""
        return engine_for(self.loaded.model, self.methods, self.config)

    @cached_property
    def traffic(self) -> dict[Method, griffin.Traffic]:
        """What a step reads under each method that is not dense."""
        model, widths = self.engine.model, self.engine.widths
        pruning = [method for method in self.methods if not method.dense]
        return {
            method: griffin.traffic(model, method.kept(widths), method.scorer, method.quantization)
            for method in pruning
        }

    def lacks(self, method: Method, item: Any) -> bool:
        """Whether a method has no sample of an item."""
        return item.index not in self.done[method]

    def groups(
        self, items: Sequence[Item], batches: int = 1, size: int | None = None
    ) -> Iterator[tuple[list[Item], Sequence[Method]]]:
        """The items in groups of at least so many batches of rows, one by one where rows run alone; and the methods
        that run with a group. A group whose samples are all there is left out.

        Args:
            items: prompts or other items, each a row under every method.
            batches: how many batches of rows a group has; one, of one method, where experts are shared.
            size: of a group, where it does not follow from the batch size.
        """
        shared, rows = self.config.shared_experts, self.config.batch_size
        size = size or (rows if shared or rows == 1 else max(1, -(-batches * rows // len(self.methods))))
        for start in range(0, len(items), size):
            group = list(items[start : start + size])
            needed = [method for method in self.methods if any(self.lacks(method, item) for item in group)]
            if needed:
                yield group, needed if shared or rows == 1 else self.methods

    def prefill(self, ids: Sequence[int], prefix: PromptState | None = None) -> PromptState:
        """A prompt, after it has run dense, from a prefix on that has."""
        likely = any(method.prunes_vocabulary for method in self.methods)
        record = griffin.wanted(self.methods)
        return griffin.prefill(self.engine, [ids], record, prefix=prefix, likely_tokens=likely)[0]

    def begun(
        self, items: Sequence[Item], methods: Sequence[Method], prefilled: Callable[[Item], PromptState]
    ) -> Iterator[tuple[Iterator[Row], int]]:
        """The rows of a group, and how many of them run at a time: each prompt runs when there is room for its first
        row. Where experts are shared the rows of one method are together.

        Args:
            items: of the group; they label their rows.
            methods: that run with it.
            prefilled: an item's prompt, after it has run dense.
        """
        engine, seed = self.engine, self.config.seed
        if not self.config.shared_experts:
            states = ((item, prefilled(item)) for item in items)
            pairs = ((item, state, method) for item, state in states for method in methods)
            rows = (griffin.begin(engine, [state], method, seed, [item])[0] for item, state, method in pairs)
            yield rows, self.config.batch_size
            return
        together = [prefilled(item) for item in items]
        for method in methods:
            yield iter(griffin.begin(engine, together, method, seed, items)), len(items)

    def generated(
        self,
        items: Sequence[Item],
        methods: Sequence[Method],
        prefilled: Callable[[Item], PromptState],
        generation: griffin.Generation,
        max_prompt_tokens: int,
    ) -> Iterator[tuple[Row, float]]:
        """The rows of a group as they end, those that lack a sample, and the seconds that each took with its share of
        its prompt. Arguments are those of `begun` and of `griffin.decode`."""
        seconds: dict[Item, float] = {}

        def timed(item: Item) -> PromptState:
            began = time.perf_counter()
            state = prefilled(item)
            seconds[item] = (time.perf_counter() - began) / len(methods)
            return state

        for rows, size in self.begun(items, methods, timed):
            decoding = griffin.decode(
                self.engine, rows, generation, batch_size=size, max_prompt_tokens=max_prompt_tokens
            )
            with closing(decoding) as ended:
                for row in ended:
                    if self.lacks(row.method, row.label):
                        yield row, row.seconds + seconds[row.label]
