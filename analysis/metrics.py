"""How metrics are shown: their names, units, digits, and whether higher or lower is better."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """How a metric is shown.

    Attributes:
        label: the name in tables and on axes.
        unit: empty for a plain ratio.
        better: 1 if higher is better, -1 if lower is better, 0 if neither is.
        digits: number of decimals, as in the summary that a run prints.
        logarithmic: whether it is the exponential of a mean, so that its error is one of its logarithm.
    """

    label: str
    unit: str = ""
    better: int = 0
    digits: int = 4
    logarithmic: bool = False

    @property
    def axis(self) -> str:
        """The label of an axis, with the unit and whether higher or lower is better."""
        direction = {1: "higher is better", -1: "lower is better", 0: ""}[self.better]
        name = f"{self.label} ({self.unit})" if self.unit else self.label
        end = ", " if len(name) < 22 else ",\n"
        return f"{name}{end}{direction}" if direction else name

    def ends(self, value: float, stderr: float) -> tuple[float, float]:
        """The value less and plus one standard error; of perplexity the ends are not equally far, and above zero."""
        if self.logarithmic and value > 0:
            factor = math.exp(min(stderr / value, 700.0))  # beyond that it is none that a float holds
            return value / factor, value * factor
        return value - stderr, value + stderr

    def text(self, value: float) -> str:
        """The value, rounded to the digits of this metric."""
        return f"{value:.{self.digits}f}"


# Tables show metrics in this order. The first one that a task has is the one in its figures.
METRICS = {
    "rouge1": Metric("ROUGE-1", "F x 100", 1, 2),
    "rouge2": Metric("ROUGE-2", "F x 100", 1, 2),
    "rougeL": Metric("ROUGE-L", "F x 100", 1, 2),
    "acc": Metric("accuracy", "", 1),
    "acc_norm": Metric("accuracy, length-normalised", "", 1),
    "f1": Metric("F1", "", 1),
    "em": Metric("exact match", "", 1),
    "exact_match": Metric("exact match", "", 1),
    "exact_match_strict_match": Metric("exact match, strict", "", 1),
    "pass_at_1": Metric("pass@1", "", 1),
    "perplexity": Metric("perplexity", "", -1, 2, logarithmic=True),
    "kl": Metric("KL(dense ‖ pruned)", "nats", -1),
    "top1_agreement": Metric("top-1 agreement", "", 1),
    "equal_texts": Metric("texts equal to dense's", "", 1),
    "differ_at_tie": Metric("first difference at a tie of two logits"),
    "differ_at_one_step": Metric("at one step between them"),
    "differ_further": Metric("at more steps", "", -1),
    "acceptance": Metric("acceptance of drafts, sampled", "", 1),
    "answer_tokens": Metric("answer", "tokens", 0, 1),
    "acceptance_rate": Metric("accepted drafts", "", 1, 3),
    "tokens_per_check": Metric("tokens", "per check", 1, 2),
    "drafted_per_check": Metric("drafted tokens", "per check", 0, 2),
    "dense_steps": Metric("dense steps", "of all steps", 0, 3),
    "effective_density": Metric("effective density", "bytes read / dense", -1, 3),
    "predicted_speedup": Metric("predicted speed-up", "x", 1, 2),
    "predicted_speedup_charged": Metric("predicted speed-up, checks charged", "x", 1, 2),
    "predicted_draft_tokens": Metric("tokens to draft", "", 0, 0),
    "decode_speedup": Metric("decode speed-up", "x", 1, 2),
    "pruned_decode_speedup": Metric("decode speed-up unverified", "x", 1, 2),
    "decode_limit": Metric("memory-traffic limit", "x", 0, 2),
    "decode_fraction_of_limit": Metric("share of the limit", "", 1, 2),
    "total_speedup": Metric("total speed-up", "x", 1, 2),
    "prompt_overhead": Metric("prompt overhead / dense prefill", "", -1, 3),
    "compaction_vs_memcpy": Metric("compaction / memcpy", "", -1, 2),
    "breakeven_tokens": Metric("break-even", "tokens", -1, 1),
    "dense_decode_ms": Metric("dense decoding", "ms/token", 0, 2),
    "pruned_decode_ms": Metric("pruned decoding", "ms/token", -1, 2),
    "draft_ms": Metric("drafting", "ms/token", -1, 2),
    "check_ms": Metric("checking", "ms/token", -1, 2),
    "learn_ms": Metric("learning", "ms/token", -1, 2),
    "learning_overhead": Metric("learning / checking", "", -1, 3),
    "jaccard_sequences": Metric("Jaccard of different sequences"),
    "jaccard_halves": Metric("of a sequence's halves"),
    "jaccard_other_halves": Metric("of different sequences' halves"),
    "jaccard_generation": Metric("of prompt and generation"),
    "jaccard_other_generation": Metric("of prompt and another's generation"),
    "kept_energy": Metric("energy in the sequence's top k"),
    "token_energy": Metric("energy in each token's own top k"),
}


def metric(name: str) -> Metric:
    """How a metric is shown. A metric that is not in `METRICS` is shown under its own name."""
    return METRICS.get(name, Metric(name))


def order(name: str) -> tuple[int, str]:
    """A sort key that gives the order of `METRICS`, then the other metrics by name."""
    names = list(METRICS)
    return (names.index(name) if name in names else len(names), name)
