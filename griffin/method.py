"""A method: everything that says how a model is pruned.

The library, the configuration, the records and the tables all name methods by this one class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from griffin.compensation import COMPENSATIONS
from griffin.draft_vocabulary import DRAFT_VOCABULARIES
from griffin.refresh import REFRESHES
from griffin.selection import BUDGETS, SELECTIONS, kept_per_layer
from griffin.statistics import STATISTICS
from griffin.token_statistics import TOKEN_STATISTICS

# name: which drafted tokens are kept (see `griffin.verification`).
VERIFICATIONS = {
    "none": "nothing is drafted: what the experts generate is the text, as in the paper",
    "exact": "those that the dense model would have generated: its text, or its distribution",
    "threshold": "those that the dense model gives at least `verification_threshold`: not exact (Sirius)",
}

MOST_DRAFTED = 16  # tokens before a check


@dataclass(frozen=True)
class Method:
    """One way to prune.

    Attributes:
        statistic: what scores the neurons, one of `STATISTICS`; or, for each token by itself, one of
            `TOKEN_STATISTICS`, which choose by `topk`, are not compensated or refreshed, and run masked.
        selection: how scores become experts, one of `SELECTIONS`.
        sparsity: share of FF neurons dropped, 0 <= sparsity < 1, of all layers or one number per layer; 0 is the dense
            model, for which nothing else here means anything.
        compensation: how the kept neurons make up for the dropped ones, one of `COMPENSATIONS`.
        budget: how the layers share what is kept, one of `BUDGETS`.
        refresh: what follows the generated text, one of `REFRESHES`.
        verification: how the dense model checks what the experts draft, one of `VERIFICATIONS`. The others mean
            nothing where it is `none`.
        draft_tokens: how many tokens are drafted before each check, at most `MOST_DRAFTED`; `auto` drafts until the
            draft is unsure.
        draft_vocabulary: of which tokens drafts are made, one of `DRAFT_VOCABULARIES`.
        prompt_lookup: whether the draft is what followed the last tokens where they stood before, and the experts'
            where they did not.
        verification_threshold: the least dense probability of a token that is kept, of `threshold` only.

    Raises:
        ValueError: a value that is not allowed; the message names the key, the value and what is allowed.
        TypeError: a sparsity that is no number.
    """

    statistic: str = "griffin"
    selection: str = "topk"
    sparsity: float | tuple[float, ...] = 0.5
    compensation: str = "none"
    budget: str = "uniform"
    refresh: str = "none"
    verification: str = "none"
    draft_tokens: int | str = "auto"
    draft_vocabulary: str = "prompt"
    prompt_lookup: bool = False
    verification_threshold: float = 0.1

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("statistic", self.statistic, (*STATISTICS, *TOKEN_STATISTICS)),
            ("selection", self.selection, SELECTIONS),
            ("compensation", self.compensation, COMPENSATIONS),
            ("budget", self.budget, BUDGETS),
            ("refresh", self.refresh, REFRESHES),
            ("verification", self.verification, VERIFICATIONS),
            ("draft_vocabulary", self.draft_vocabulary, DRAFT_VOCABULARIES),
        ):
            if value not in allowed:
                raise ValueError(f"{key}={value!r}: expected one of {', '.join(allowed)}")
        for share in self.sparsity if isinstance(self.sparsity, tuple) else (self.sparsity,):
            if isinstance(share, bool) or not isinstance(share, int | float):
                raise TypeError(f"sparsity={share!r}: expected a number, 0 <= sparsity < 1, or one for each layer")
            if not 0 <= share < 1:
                raise ValueError(f"sparsity={share}: expected 0 <= sparsity < 1")
        if isinstance(self.sparsity, tuple) and self.budget != "uniform" and not self.dense:
            raise ValueError(f"budget={self.budget!r} with a sparsity for each layer: expected one of the two")
        if self.refresh == "compensation" and self.compensation not in LEARNING:
            raise ValueError(
                f"refresh={self.refresh!r} with compensation={self.compensation!r}, which cannot go on learning: "
                f"expected compensation={', '.join(LEARNING)}"
            )
        if self.refresh == "drift" and self.verification != "none":
            raise ValueError(
                f"refresh='drift' with verification={self.verification!r}, whose checks see all activations: expected "
                "refresh='none', 'experts' or 'compensation'"
            )
        if self.by_token and not self.dense:
            for key, value, only in (
                ("selection", self.selection, "topk"),
                ("compensation", self.compensation, "none"),
                ("refresh", self.refresh, "none"),
                ("verification", self.verification, "none"),
            ):
                if value != only:
                    raise ValueError(
                        f"{key}={value!r} with statistic={self.statistic!r}, by which each token chooses for itself: "
                        f"expected {key}={only!r}"
                    )
        self._check_verification()

    def _check_verification(self) -> None:
        if self.draft_tokens != "auto" and not (
            isinstance(self.draft_tokens, int)
            and not isinstance(self.draft_tokens, bool)
            and 1 <= self.draft_tokens <= MOST_DRAFTED
        ):
            raise ValueError(f"draft_tokens={self.draft_tokens!r}: expected auto, or 1 to {MOST_DRAFTED}")
        if not 0 < self.verification_threshold < 1:
            raise ValueError(
                f"verification_threshold={self.verification_threshold}: expected a probability, 0 < threshold < 1"
            )
        if not isinstance(self.prompt_lookup, bool):
            raise ValueError(f"prompt_lookup={self.prompt_lookup!r}: expected True or False")
        if self.verification != "none" and self.dense:
            raise ValueError(
                f"verification={self.verification!r} with sparsity=0: a dense draft is the model itself; "
                "expected sparsity > 0"
            )

    @property
    def by_token(self) -> bool:
        """Whether each token chooses its neurons."""
        return self.statistic in TOKEN_STATISTICS

    @property
    def verified(self) -> bool:
        """Whether the dense model checks what the experts draft."""
        return self.verification != "none"

    @property
    def prunes_vocabulary(self) -> bool:
        """Whether the draft needs the tokens that the prompt makes likely."""
        return self.verified and self.draft_vocabulary == "prompt"

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
        words += ["(by token, masked)"] if self.by_token else []
        words += [] if self.selection == "topk" else [self.selection]
        words += [] if self.budget == "uniform" else [self.budget]
        words += [] if self.refresh == "none" else [f"refresh={self.refresh}"]
        if self.verified:
            words += ["verified" if self.verification == "exact" else f"p>={self.verification_threshold:g} (not exact)"]
            words += [] if self.draft_tokens == "auto" else [f"k={self.draft_tokens}"]
            words += [] if self.draft_vocabulary == "prompt" else ["full vocabulary"]
            words += ["prompt lookup"] if self.prompt_lookup else []
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
