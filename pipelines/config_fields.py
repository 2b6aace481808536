"""Fields with help texts, and the checks that configuration classes share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from pipelines.errors import UserError


def described(text: str, default: Any = MISSING) -> Any:
    """A field with its help text, which `--help` prints; a class as the default makes a new one each time."""
    given = "default_factory" if isinstance(default, type) else "default"
    return field(**{given: default}, metadata={"help": text})


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The known word that is spelled most like it, as a question in brackets; empty if none is."""
    close = difflib.get_close_matches(word, [*known], n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def not_one_of(key: str, value: Any, allowed: Iterable[str]) -> str:
    """What to tell a user who set a key to none of the allowed values."""
    return f"{key}={value}: expected one of {', '.join(allowed)}{did_you_mean(str(value), allowed)}"


def one_of(key: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises UserError unless the value is allowed."""
    if value not in allowed:
        raise UserError(not_one_of(key, value, allowed))


def at_least(key: str, value: float | None, least: int) -> None:
    """Raises UserError if the value is smaller."""
    if value is not None and value < least:
        raise UserError(f"{key}={value}: expected {least} or more")


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
