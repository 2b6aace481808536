"""A method: everything that says how a model is pruned.

The library, the configuration, the records and the tables all name methods by this one class. A field says what it may
be, what it means, and how tables name it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from griffin.draft_vocabulary import DRAFT_VOCABULARIES
from griffin.quantization import QUANTIZATIONS
from griffin.refresh import REFRESHES
from griffin.ridge import COMPENSATIONS
from griffin.selection import BUDGETS, SELECTIONS, kept_per_layer
from griffin.statistics import STATISTICS, TOKEN_STATISTICS, Statistic, TokenStatistic

# name: which drafted tokens are kept (see `griffin.verification`).
VERIFICATIONS = {
    "none": "nothing is drafted: what the experts generate is the text, as in the paper",
    "exact": "those that the dense model would have generated: its text, or its distribution",
    "threshold": "those that the dense model gives at least `verification_threshold`: not exact (Sirius)",
}

MOST_DRAFTED = 32  # tokens before a check


def axis(default: Any, values: Sequence[str], help: str, word: str = "{}") -> Any:
    """A field of `Method`.

    Args:
        default: its value where nothing is said.
        values: what it may be; none where `Method` checks it otherwise.
        help: what it means, for people.
        word: how a label says a value that is not the default.
    """
    return field(default=default, metadata={"values": tuple(values), "help": help, "word": word})


@dataclass(frozen=True)
class Method:
    """One way to prune. Sparsity 0 is the dense model, or its quantised copy, whose neurons nothing chooses.

    Raises:
        ValueError: a value that is not allowed, or two that do not go together; the message names the key, the value
            and what is allowed.
        TypeError: a sparsity that is no number.
    """

    statistic: str | Statistic | TokenStatistic = axis(
        "griffin",
        (*STATISTICS, *TOKEN_STATISTICS),
        f"what scores the FF neurons on the prompt: {', '.join(STATISTICS)}; or for each token by itself, masked, for "
        f"quality only: {', '.join(TOKEN_STATISTICS)}; in the library also a statistic of one's own",
    )
    selection: str = axis("topk", SELECTIONS, "how scores become experts")
    sparsity: float | tuple[float, ...] = axis(
        0.5, (), "share of FF neurons dropped, 0 <= sparsity < 1, of all layers or one number per layer; 0: dense"
    )
    compensation: str = axis("none", tuple(COMPENSATIONS), "how the kept neurons make up for the dropped ones")
    budget: str = axis("uniform", tuple(BUDGETS), "how the layers share what is kept")
    refresh: str = axis("none", tuple(REFRESHES), "what follows the generated text", "refresh={}")
    quantization: str = axis("none", tuple(QUANTIZATIONS), "the precision of what the experts compute with")
    verification: str = axis("none", tuple(VERIFICATIONS), "how the dense model checks what the experts draft")
    draft_tokens: int | str = axis(
        "auto", (), f"tokens drafted before each check: 1 to {MOST_DRAFTED}; auto: until the draft is unsure", "k={}"
    )
    draft_vocabulary: str = axis(
        "prompt", tuple(DRAFT_VOCABULARIES), "of which tokens drafts are made", "{} vocabulary"
    )
    verification_threshold: float = axis(
        0.1, (), "least dense probability of a drafted token that is kept, of verification=threshold only", ""
    )

    def __post_init__(self) -> None:
        for one in fields(self):
            value, allowed = getattr(self, one.name), one.metadata["values"]
            if allowed and not isinstance(value, Statistic | TokenStatistic) and value not in allowed:
                raise ValueError(f"{one.name}={value!r}: expected one of {', '.join(allowed)}")
        several = isinstance(self.sparsity, Sequence) and not isinstance(self.sparsity, str)
        shares: tuple[Any, ...] = tuple(self.sparsity) if several else (self.sparsity,)  # type: ignore[arg-type]
        for share in shares:
            if isinstance(share, bool) or not isinstance(share, int | float):
                raise TypeError(f"sparsity={share!r}: expected a number, 0 <= sparsity < 1, or one for each layer")
            if not 0 <= share < 1:
                raise ValueError(f"sparsity={share}: expected 0 <= sparsity < 1")
        if not shares:
            raise ValueError("sparsity=[]: expected a number, 0 <= sparsity < 1, or one for each layer")
        object.__setattr__(self, "sparsity", tuple(map(float, shares)) if several else float(shares[0]))
        if several and self.budget != "uniform" and not self.dense:
            raise ValueError(f"budget={self.budget!r} with a sparsity for each layer: expected one of the two")
        if self.by_token and not self.dense:
            plain = Method(sparsity=0.0)
            for key in ("selection", "compensation", "quantization", "refresh", "verification"):
                if getattr(self, key) != getattr(plain, key):
                    raise ValueError(
                        f"{key}={getattr(self, key)!r} with statistic={self.scorer.name!r}, by which each token "
                        f"chooses for itself: expected {key}={getattr(plain, key)!r}"
                    )
        if self.refresh == "compensation" and self.compensation == "none":
            raise ValueError("refresh='compensation' with compensation='none': expected compensation='ridge'")
        self._check_verification()

    def _check_verification(self) -> None:
        number = self.draft_tokens
        counted = isinstance(number, int) and not isinstance(number, bool) and 1 <= number <= MOST_DRAFTED
        if number != "auto" and not counted:
            raise ValueError(f"draft_tokens={number!r}: expected auto, or 1 to {MOST_DRAFTED}")
        if not 0 < self.verification_threshold < 1:
            raise ValueError(
                f"verification_threshold={self.verification_threshold}: expected a probability, 0 < threshold < 1"
            )
        if self.verification != "none" and self.dense:
            raise ValueError(
                f"verification={self.verification!r} with sparsity=0: a dense draft is the model itself; "
                "expected sparsity > 0, or a quantization"
            )

    @property
    def scorer(self) -> Statistic | TokenStatistic:
        """The statistic itself."""
        if isinstance(self.statistic, str):
            return STATISTICS.get(self.statistic) or TOKEN_STATISTICS[self.statistic]
        return self.statistic

    @property
    def by_token(self) -> bool:
        """Whether each token chooses its neurons."""
        return isinstance(self.scorer, TokenStatistic)

    @property
    def oracle(self) -> bool:
        """Whether it knows what comes after the prompt: a bound for analysis, and not a method."""
        return isinstance(self.scorer, Statistic) and self.scorer.oracle

    @property
    def draws(self) -> bool:
        """Whether it needs random numbers."""
        return isinstance(self.scorer, Statistic) and (self.scorer.random or self.selection != "topk")

    @property
    def verified(self) -> bool:
        """Whether the dense model checks what the experts draft."""
        return self.verification != "none"

    @property
    def prunes_vocabulary(self) -> bool:
        """Whether the draft needs the tokens that the prompt makes likely."""
        return self.verified and self.draft_vocabulary == "prompt"

    @property
    def prunes(self) -> bool:
        """Whether neurons are dropped."""
        return any(self.sparsity) if isinstance(self.sparsity, tuple) else bool(self.sparsity)

    @property
    def dense(self) -> bool:
        """Whether it is the model as it is."""
        return not self.prunes and self.quantization == "none"

    @property
    def settings(self) -> dict[str, Any]:
        """Those of its fields that mean something, by name. Methods with the same settings prune alike."""
        if self.dense:
            return {"sparsity": 0.0}
        idle = {"none": DRAFTING, "exact": DRAFTING[-1:]}.get(self.verification, ())
        idle += () if self.prunes else CHOOSING
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name not in idle}

    @property
    def name(self) -> str:
        """That of the named method which it is but for its sparsity; empty without one."""
        mine = self.settings | {"sparsity": 0.0}
        return next((name for name, named in METHODS.items() if named.settings | {"sparsity": 0.0} == mine), "")

    @property
    def family(self) -> str:
        """The method without its sparsity, in words: its name, or the settings that make it."""
        marks = ["(by token, masked)"] * (self.by_token and self.prunes) + ["(not exact)"] * (
            self.verification == "threshold"
        )
        return " ".join([self.name or self.made_of, *marks])

    @property
    def made_of(self) -> str:
        """What makes it, but for its sparsity, in words: its statistic, and what else is no default."""
        words = []
        if self.prunes:
            words += [self.scorer.name if self.compensation == "none" else f"{self.scorer.name}+{self.compensation}"]
        axes = {one.name: one for one in fields(self)}
        for name, value in self.settings.items():
            if name in ("statistic", "compensation", "sparsity") or value == axes[name].default:
                continue
            if name == "verification":
                words += ["verified" if value == "exact" else f"p>={self.verification_threshold:g}"]
            else:
                words += [axes[name].metadata["word"].format(value)]
        return " ".join(filter(None, words)) or "dense"

    @property
    def label(self) -> str:
        """The method in words, for tables and run names."""
        share = "per layer" if isinstance(self.sparsity, tuple) else f"{100 * self.sparsity:g}%"
        return f"{self.family} {share}" if self.prunes else self.family

    def kept(self, widths: Sequence[int]) -> list[int]:
        """How many neurons each layer keeps.

        Args:
            widths: FF width of each layer.

        Raises:
            ValueError: the sparsities are not as many as the layers.
        """
        return kept_per_layer(widths, self.sparsity, self.budget)


# Fields that mean nothing where no neuron is dropped.
CHOOSING = ("statistic", "selection", "compensation", "budget", "refresh")

# Fields that mean nothing without verification.
DRAFTING = ("draft_tokens", "draft_vocabulary", "verification_threshold")

DENSE = Method(sparsity=0.0)
RECIPE = Method("joint", compensation="ridge", budget="late", refresh="compensation")
# What helps a text that nothing checks does not pay in drafts: neither compensation nor what it learns
# (docs/verified-decoding.md).
EXACT = Method("impact", quantization="int4", verification="exact")

# Methods that have a name.
METHODS: Mapping[str, Method] = {
    "dense": DENSE,
    "griffin": Method(),
    "magnitude": Method("magnitude"),
    "wanda": Method("wanda"),
    "teal": Method("teal"),
    "int8": Method(sparsity=0.0, quantization="int8"),
    "int4": Method(sparsity=0.0, quantization="int4"),
    "recipe": RECIPE,
    "exact": EXACT,
    "sirius": Method(verification="threshold", draft_tokens=16, draft_vocabulary="full"),
}


def as_method(method: Method | str | float | Sequence[float] = "griffin", **options: Any) -> Method:
    """A method from one, the name of one, or its sparsity; with some of its fields said anew.

    Raises:
        ValueError: no method has this name, or the fields do not go together.
        TypeError: no such field.
    """
    if not isinstance(method, str | Method):
        method, options = "griffin", {"sparsity": method, **options}
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"method={method!r}: expected one of {', '.join(METHODS)}, or a griffin.Method")
        method = METHODS[method]
    return replace(method, **options)
