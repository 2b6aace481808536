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
    config = LATER | record["config"]
    method, evaluation = method_entry(config), evaluation_entry(config, record["environment"])
    return record | {
        "method": method | (record.get("method") or {}),
        "evaluation": evaluation | (record.get("evaluation") or {}),
    }
