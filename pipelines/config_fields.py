"""Fields with help texts, and the checks that configuration classes share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import field, fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from pipelines.errors import UserError

# The keys that name a file of the user's.
_FILES = ("data_files", "shots_file")


def described(text: str, default: Any = MISSING, values: tuple[str, ...] = (), *, least: int | None = None) -> Any:
    """A field with its help text, which `--help` prints; a class as the default makes a new one each time. `check` asks
    for one of the values, and for a number, or numbers of a list, that is no less."""
    given = "default_factory" if isinstance(default, type) else "default"
    return field(**{given: default}, metadata={"help": text, "values": values, "least": least})


def check(node: Any, prefix: str = "") -> None:
    """Raises UserError where a key has a value that its field does not allow; keys of the class begin with `prefix`."""
    for item in fields(node):
        key, value, allowed = prefix + item.name, getattr(node, item.name), item.metadata
        if allowed["values"]:
            one_of(key, value, allowed["values"])
        if allowed["least"] is not None:
            for number in value if isinstance(value, list) else [value]:
                at_least(key, number, allowed["least"])
        if item.name in _FILES and value is not None and not Path(value).is_file():
            raise UserError(f"{key}={value}: {'not a file' if Path(value).exists() else 'no such file'}")


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
