"""What generated answers are measured by beside their quality: how long they are, what they took to decode, and what
became of their drafts; and what would become of drafts, from where a pruned model agrees with the dense one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np

import griffin
from pipelines.records import Sample, mean_and_stderr
from pipelines.tasks.prompts import Evaluation

if TYPE_CHECKING:
    from pipelines.models import LoadedModel

# Metrics of drafts that have a standard error.
ERRORS = frozenset(
    ("acceptance_rate", "tokens_per_check", "effective_density", "predicted_speedup", "predicted_speedup_charged")
)

# In the samples' `drafting`, beside `step_bytes` and `seconds`.
_COUNTS = ("checks", "drafted", "accepted", "emitted", "draft_bytes", "charged_checks")


def decoding_part(row: griffin.Row, run: Evaluation) -> Sample:
    """What a sample says of how its answer was decoded: its tokens, and, unless it is dense and so has no traffic, the
    bytes of weights read for those behind the first, which comes with the prompt, beside what dense decoding reads."""
    part: Sample = {"generated_tokens": len(row.tokens)}
    traffic = run.traffic.get(row.method)
    if traffic is None:
        return part
    if row.method.verified:
        written = {"accepted_by_check": row.drafts.accepted_by_check, "drafted_spans": drafted_spans(row, run.loaded)}
        return part | written | drafting_part([row.drafts], traffic.dense, run.check_costs)
    taken = row.statistics(traffic)
    return part | {"weight_bytes": {"read": taken.bytes_read, "dense": taken.dense_bytes}}


def drafted_spans(row: griffin.Row, loaded: LoadedModel) -> list[tuple[int, int]]:
    """Where a verified text is accepted drafts: from one character to before another. The rest is the dense model's
    own: the first token, and one a check."""
    spans, count = list[tuple[int, int]](), 1
    for accepted in row.drafts.accepted_by_check:
        begin, end = (
            len(loaded.tokenizer.decode(row.tokens[:tokens], skip_special_tokens=True))
            for tokens in (count, count + accepted)
        )
        begin = max(begin, spans[-1][1] if spans else 0)  # a character may come of several tokens
        spans += [(begin, end)] * (end > begin)
        count += accepted + 1
    return spans


def drafting_part(
    drafts: Sequence[griffin.DraftStatistics], step_bytes: int, check_costs: Mapping[int, float] | None = None
) -> Sample:
    """What a sample says of drafts that the dense model checked, in sum over its rows; a dense step reads `step_bytes`.

    Another run of the same call has other seconds, and nothing else. `check_costs` says what checks of so many tokens
    cost on a device, in dense steps; widths between two of them cost in proportion.
    """
    drafting: Sample = {name: sum(getattr(row, name) for row in drafts) for name in _COUNTS[:-1]}
    if check_costs:
        widths = [width for row in drafts for width in row.widths]
        drafting["charged_checks"] = float(np.interp(widths, [*check_costs], [*check_costs.values()]).sum())
    drafting["step_bytes"] = step_bytes
    drafting["seconds"] = {part: round(sum(row.seconds[part] for row in drafts), 6) for part in drafts[0].seconds}
    return {"drafting": drafting}


def begin_alike(tokens: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two texts have in common before they first differ."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tokens, others, strict=False)))


def means(samples: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    """The means of these numbers over the samples, with standard errors; none without samples."""
    values: dict[str, float] = {}
    for name in names if samples else ():
        values[name], values[f"{name}_stderr"] = mean_and_stderr([sample[name] for sample in samples])
    return values


def scored_metrics(samples: Sequence[Sample], names: Sequence[str]) -> dict[str, float]:
    """The means of these scores with standard errors, counts, and what answers took, over all samples of a run."""
    scored = [sample for sample in samples if "skipped" not in sample]
    counts = {name: sum(sample[name] for sample in scored) for name in ("prompt_tokens", "generated_tokens")}
    return means(scored, names) | sample_counts(samples) | counts | answer_metrics(scored)


def sample_counts(samples: Sequence[Sample]) -> dict[str, float]:
    """How many samples were measured, and how many skipped because their prompt does not fit."""
    skipped = sum("skipped" in sample for sample in samples)
    return {"samples": len(samples) - skipped, "skipped_prompts": skipped}


def answer_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """`answer_tokens`, with its standard error, and `effective_density`, the bytes that pruned decoding read over those
    of dense decoding, over all samples; what became of drafts where there were any. Answers that are scored, and not
    written, have no tokens."""
    written = [{"answer_tokens": sample["generated_tokens"]} for sample in samples if "generated_tokens" in sample]
    values = means(written, ("answer_tokens",))
    return values | effective_density(samples) | drafting_metrics(samples)


def effective_density(samples: Sequence[Sample]) -> dict[str, float]:
    """`effective_density` of decoding that nothing was verified in; none of dense decoding."""
    counted = [sample["weight_bytes"] for sample in samples if "weight_bytes" in sample]
    dense = sum(sample["dense"] for sample in counted)
    return {"effective_density": sum(sample["read"] for sample in counted) / dense} if dense else {}


def drafting_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Ratios of sums over the samples, with their standard errors over samples by the jackknife; none without drafts.

    The predicted speed-up is the one of bytes of weights read, of the dense steps over those of drafts and checks; the
    charged one counts what checks cost on a device, where that was measured.
    """
    found = [sample["drafting"] for sample in samples if "drafting" in sample]
    names = [name for name in _COUNTS if all(name in sample for sample in found)]
    totals = {name: sum(sample[name] for sample in found) for name in names}
    dense_bytes = found[0]["step_bytes"] if found else 0
    values = _ratios(totals, dense_bytes)
    # What the others come to without one sample is the total less its counts.
    without = [_ratios({name: totals[name] - sample[name] for name in names}, dense_bytes) for sample in found]
    for name in sorted(values.keys() & ERRORS) if len(found) > 1 else ():
        left = [ratios[name] for ratios in without if name in ratios]
        mean = sum(left) / len(left)
        values[f"{name}_stderr"] = ((len(left) - 1) / len(left) * sum((ratio - mean) ** 2 for ratio in left)) ** 0.5
    return values


def _ratios(counts: dict[str, float], dense_bytes: int) -> dict[str, float]:
    checks, drafted, accepted, emitted, draft_bytes = (counts.get(name, 0) for name in _COUNTS[:-1])
    if not checks:
        return {}
    density = (checks * dense_bytes + draft_bytes) / (emitted * dense_bytes)
    values = {
        "tokens_per_check": emitted / checks,
        "drafted_per_check": drafted / checks,
        "dense_steps": checks / (checks + drafted),
        "effective_density": density,
        "predicted_speedup": 1 / density,
    }
    if "charged_checks" in counts:
        values["predicted_speedup_charged"] = emitted / (counts["charged_checks"] + draft_bytes / dense_bytes)
    return values | ({"acceptance_rate": accepted / drafted} if drafted else {})


def learning_overhead(samples: Sequence[Sample]) -> dict[str, float]:
    """What learning took, over what the checks took: for a record's `timing`, which may differ from run to
    run, and for latency, where times are what is measured."""
    found = [sample["drafting"]["seconds"] for sample in samples if "drafting" in sample]
    checking = sum(seconds["check"] for seconds in found)
    return {"learning_overhead": sum(seconds["learn"] for seconds in found) / checking} if checking else {}


def rounds(agreement: Sequence[int], draft_tokens: int) -> int:
    """How many rounds a text takes, from which tokens a draft gets right: each round keeps the drafts that are right,
    at most so many, up to the first that is not, and has one more token of the dense model's own."""
    ended = kept = 0
    for right in agreement:
        if right and kept < draft_tokens:
            kept += 1
        else:
            ended, kept = ended + 1, 0
    return ended + (kept > 0)


def predicted(agreements: Sequence[Sequence[int]], draft_cost: float, most: int = 8) -> dict[str, float]:
    """The speed-up of exact greedy decoding with the best fixed number of drafted tokens, and that number.

    Of each text there is 1 for every token that a draft would get right, else 0. A draft costs so many dense steps.
    """
    tokens = sum(map(len, agreements))
    speedups = {
        number: tokens / sum(rounds(agreement, number) * (number * draft_cost + 1) for agreement in agreements)
        for number in range(1, most + 1)
    }
    best = max(speedups, key=lambda number: speedups[number])
    return {"predicted_speedup": speedups[best], "predicted_draft_tokens": best}
