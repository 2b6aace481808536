"""What generated answers are measured by beside their quality: how long they are, and what they took to decode."""

from __future__ import annotations

from collections.abc import Sequence

import griffin
from pipelines.records import Sample, mean_and_stderr
from pipelines.tasks import drafting


class DecodingCost:
    """What decoding takes under each method.

    Args:
        engine: the model.
        methods: all that will be asked for.

    Attributes:
        traffic: what a step reads, by method.
    """

    def __init__(self, engine: griffin.Engine, methods: Sequence[griffin.Method]) -> None:
        self.traffic = {
            method: griffin.traffic(engine.model, method.kept(engine.widths), method.scorer, method.quantization)
            for method in methods
            if not method.dense
        }

    def sample_part(self, method: griffin.Method, rows: Sequence[griffin.Row]) -> Sample:
        """What a sample says of how its answers were decoded: their tokens, and the bytes of weights that were read for
        those behind the first, which comes with the prompt; beside them, what dense decoding would read.

        Args:
            method: how it was pruned.
            rows: of the sample; without any, nothing was generated.
        """
        if not rows:
            return {}
        part: Sample = {"generated_tokens": sum(len(row.tokens) for row in rows)}
        if method.dense:
            return part
        if method.verified:
            return part | drafting.sample_part([row.drafts for row in rows], self.traffic[method].dense)
        found = [row.statistics(self.traffic[method]) for row in rows]
        read, dense = sum(one.bytes_read for one in found), sum(one.dense_bytes for one in found)
        return part | {"weight_bytes": {"read": read, "dense": dense}}


def answer_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """`answer_tokens`, with its standard error, and `effective_density`, the bytes that pruned decoding read over those
    of dense decoding, over all samples; what became of drafts where there were any.

    Samples that were written before these were measured give none.
    """
    values: dict[str, float] = {}
    lengths = [sample["generated_tokens"] for sample in samples if "generated_tokens" in sample]
    if lengths and len(lengths) == len(samples):
        values["answer_tokens"], values["answer_tokens_stderr"] = mean_and_stderr(lengths)
    return values | effective_density(samples) | drafting.metrics(samples)


def scored_metrics(samples: Sequence[Sample], names: Sequence[str]) -> dict[str, float]:
    """The means of these scores with standard errors, counts, and what answers took, over all samples of a run."""
    scored = [sample for sample in samples if "skipped" not in sample]
    values: dict[str, float] = {}
    for name in names if scored else ():
        values[name], values[f"{name}_stderr"] = mean_and_stderr([sample[name] for sample in scored])
    counts = {name: sum(sample[name] for sample in scored) for name in ("prompt_tokens", "generated_tokens")}
    skipped = {"samples": len(scored), "skipped_prompts": len(samples) - len(scored)}
    return values | skipped | counts | answer_metrics(scored)


def effective_density(samples: Sequence[Sample]) -> dict[str, float]:
    """`effective_density` of decoding that nothing was verified in; none of dense decoding."""
    counted = [sample["weight_bytes"] for sample in samples if "weight_bytes" in sample]
    dense = sum(one["dense"] for one in counted)
    return {"effective_density": sum(one["read"] for one in counted) / dense} if dense else {}
