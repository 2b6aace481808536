"""Records that earlier versions wrote. No other module knows what they lack."""

from __future__ import annotations

from typing import Any

from pipelines.description import LATER, evaluation_entry, method_entry


def upgraded(record: dict[str, Any]) -> dict[str, Any]:
    """The record as today's version would have written it; a record of today's version is returned as it is.

    At first records had no `method` and no `evaluation`. Both follow from the configuration, where a setting that did
    not exist yet has the value that changes nothing.

    Raises:
        KeyError: the configuration lacks a setting that it always had.
    """
    if record.get("method") and record.get("evaluation"):
        return record
    from griffin.method import Method  # which imports torch, so only where there is an old record

    config = {"shared_experts": False, "mode": None} | LATER | record["config"]
    sparsity = tuple(config["sparsity"]) if isinstance(config["sparsity"], list) else config["sparsity"]
    axes = ("statistic", "selection", "compensation", "budget", "refresh")
    method = Method(sparsity=sparsity, **{axis: config[axis] for axis in axes})
    return record | {
        "method": method_entry(config, method.label, method.family),
        "evaluation": evaluation_entry(config, record["environment"]),
    }
