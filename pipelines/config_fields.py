"""Fields with help texts, and the checks that configuration classes share."""

from __future__ import annotations

import difflib
from dataclasses import field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from pipelines.errors import UserError


def described(text: str, default: Any = MISSING) -> Any:
    """A field with its help text, which `--help` prints; a class as the default makes a new one each time."""
    if isinstance(default, type):
        return field(default_factory=default, metadata={"help": text})
    return field(default=default, metadata={"help": text})


def one_of(key: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises UserError unless the value is allowed."""
    if value not in allowed:
        close = difflib.get_close_matches(str(value), allowed, n=1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(f"{key}={value}: expected one of {', '.join(allowed)}{meant}")


def at_least(key: str, value: float | None, least: int) -> None:
    """Raises UserError if the value is smaller."""
    if value is not None and value < least:
        raise UserError(f"{key}={value}: expected {least} or more")


def count_or_auto(key: str, value: Any) -> None:
    """Raises UserError unless the value is a whole number, 1 or more, or the word auto."""
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise UserError(f"{key}={'null' if value is None else value}: expected a whole number, 1 or more, or auto")


def lengths(key: str, values: list[int]) -> None:
    """Raises UserError unless there is a length, and all are 1 or more."""
    if not values:
        raise UserError(f"{key}=[]: expected at least one length")
    for value in values:
        at_least(key, value, 1)


def is_file(key: str, path: str | None) -> None:
    """Raises UserError unless the file, if one is named, is there."""
    if path is not None and not Path(path).is_file():
        raise UserError(f"{key}={path}: {'not a file' if Path(path).exists() else 'no such file'}")
