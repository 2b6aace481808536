"""A method: everything that says how a model is pruned.

The library, the configuration, the records and the tables all name methods by this one class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from griffin.compensation import COMPENSATIONS
from griffin.refresh import REFRESHES
from griffin.selection import BUDGETS, SELECTIONS, kept_per_layer
from griffin.statistics import STATISTICS


@dataclass(frozen=True)
class Method:
    """One way to prune.

    Attributes:
        statistic: what scores the neurons, one of `STATISTICS`.
        selection: how scores become experts, one of `SELECTIONS`.
        sparsity: share of FF neurons dropped, 0 <= sparsity < 1, of all layers or one number per layer; 0 is the dense
            model, for which nothing else here means anything.
        compensation: how the kept neurons make up for the dropped ones, one of `COMPENSATIONS`.
        budget: how the layers share what is kept, one of `BUDGETS`.
        refresh: what follows the generated text, one of `REFRESHES`.

    Raises:
        ValueError: a value that is not allowed; the message names the key, the value and what is allowed.
    """

    statistic: str = "griffin"
    selection: str = "topk"
    sparsity: float | tuple[float, ...] = 0.5
    compensation: str = "none"
    budget: str = "uniform"
    refresh: str = "none"

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("statistic", self.statistic, STATISTICS),
            ("selection", self.selection, SELECTIONS),
            ("compensation", self.compensation, COMPENSATIONS),
            ("budget", self.budget, BUDGETS),
            ("refresh", self.refresh, REFRESHES),
        ):
            if value not in allowed:
                raise ValueError(f"{key}={value!r}: expected one of {', '.join(allowed)}")
        for share in self.sparsity if isinstance(self.sparsity, tuple) else (self.sparsity,):
            if not 0 <= share < 1:
                raise ValueError(f"sparsity={share}: expected 0 <= sparsity < 1")
        if isinstance(self.sparsity, tuple) and self.budget != "uniform" and not self.dense:
            raise ValueError(f"budget={self.budget!r} with a sparsity for each layer: expected one of the two")
        if self.refresh == "compensation" and self.compensation not in LEARNING:
            raise ValueError(
                f"refresh={self.refresh!r} with compensation={self.compensation!r}, which cannot go on learning: "
                f"expected compensation={', '.join(LEARNING)}"
            )

    @property
    def dense(self) -> bool:
        """Whether nothing is pruned."""
        return not any(self.sparsity) if isinstance(self.sparsity, tuple) else not self.sparsity

    @property
    def family(self) -> str:
        """The method without its sparsity, in words."""
        if self.dense:
            return "dense"
        words = [self.statistic if self.compensation == "none" else f"{self.statistic}+{self.compensation}"]
        words += [] if self.selection == "topk" else [self.selection]
        words += [] if self.budget == "uniform" else [self.budget]
        words += [] if self.refresh == "none" else [f"refresh={self.refresh}"]
        return " ".join(words)

    @property
    def label(self) -> str:
        """The method in words, for tables and run names."""
        if self.dense:
            return "dense"
        return f"{self.family} {'per layer' if isinstance(self.sparsity, tuple) else f'{100 * self.sparsity:g}%'}"

    def kept(self, widths: Sequence[int]) -> list[int]:
        """How many neurons each layer keeps.

        Args:
            widths: FF width of each layer.

        Raises:
            ValueError: the sparsities are not as many as the layers.
        """
        return kept_per_layer(widths, self.sparsity, self.budget)


# Compensations that `refresh=compensation` can go on with.
LEARNING = tuple(name for name, one in COMPENSATIONS.items() if one is not None and one.learn is not None)
