"""What became of the drafts of verified runs, in samples and metrics; and what would become of drafts, from where
a pruned model agrees with the dense one."""

from __future__ import annotations

from collections.abc import Sequence

import griffin
from pipelines.records import Sample

# Metrics that have a standard error.
ERRORS = frozenset(("acceptance_rate", "tokens_per_check", "effective_density", "predicted_speedup"))

# In the samples' `drafting`, beside `step_bytes` and `seconds`.
_COUNTS = ("checks", "drafted", "accepted", "emitted", "draft_bytes")


def sample_part(drafts: Sequence[griffin.DraftStatistics], step_bytes: int) -> Sample:
    """What a sample says of drafts that the dense model checked, in sum.

    Another run of the same call has other seconds, and nothing else.

    Args:
        drafts: of its rows.
        step_bytes: what one dense step reads.
    """
    drafting: Sample = {name: sum(getattr(one, name) for one in drafts) for name in _COUNTS}
    drafting["step_bytes"] = step_bytes
    drafting["seconds"] = {part: round(sum(one.seconds[part] for one in drafts), 6) for part in drafts[0].seconds}
    return {"drafting": drafting}


def metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Ratios of sums over the samples, with their standard errors over samples by the jackknife; none without drafts.

    The predicted speed-up is the one of bytes of weights read, of the dense steps over those of drafts and checks.
    """
    found = [sample["drafting"] for sample in samples if "drafting" in sample]
    totals = {name: sum(sample[name] for sample in found) for name in _COUNTS}
    dense_bytes = found[0]["step_bytes"] if found else 0
    values = _ratios(totals, dense_bytes)
    # What the others come to without one sample is the total less its counts.
    without = [_ratios({name: totals[name] - sample[name] for name in _COUNTS}, dense_bytes) for sample in found]
    for name in sorted(values.keys() & ERRORS) if len(found) > 1 else ():
        left = [ratios[name] for ratios in without if name in ratios]
        mean = sum(left) / len(left)
        values[f"{name}_stderr"] = ((len(left) - 1) / len(left) * sum((ratio - mean) ** 2 for ratio in left)) ** 0.5
    return values


def _ratios(counts: dict[str, int], dense_bytes: int) -> dict[str, float]:
    checks, drafted, accepted, emitted, draft_bytes = (counts[name] for name in _COUNTS)
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
    return values | ({"acceptance_rate": accepted / drafted} if drafted else {})


def timing(samples: Sequence[Sample]) -> dict[str, float]:
    """What learning took, over what the checks took: for a record's `timing`, which may differ from run to
    run, and for latency, where times are what is measured."""
    found = [sample["drafting"]["seconds"] for sample in samples if "drafting" in sample]
    checking = sum(seconds["check"] for seconds in found)
    learning = sum(seconds["learn"] for seconds in found)
    return {"learning_overhead": learning / checking} if checking else {}


def agreeing_runs(agreement: Sequence[int], most: int) -> int:
    """How many rounds a text takes, from which tokens a draft gets right: each round keeps the drafts that are right,
    at most so many, up to the first that is not, and has one more token of the dense model's own."""
    rounds = place = 0
    while place < len(agreement):
        kept = 0
        while kept < most and place + kept < len(agreement) and agreement[place + kept]:
            kept += 1
        rounds, place = rounds + 1, place + kept + 1
    return rounds


def predicted(agreements: Sequence[Sequence[int]], draft_cost: float, most: int = 8) -> dict[str, float]:
    """The speed-up of exact greedy decoding with the best fixed number of drafted tokens, and that number.

    Args:
        agreements: of each text, 1 for every token that a draft would get right, else 0.
        draft_cost: of drafting a token, in dense steps.
        most: the largest number that is tried.
    """
    tokens = sum(map(len, agreements))
    speedups = {
        number: tokens / sum(agreeing_runs(one, number) * (number * draft_cost + 1) for one in agreements)
        for number in range(1, most + 1)
    }
    best = max(speedups, key=lambda number: speedups[number])
    return {"predicted_speedup": speedups[best], "predicted_draft_tokens": best}
