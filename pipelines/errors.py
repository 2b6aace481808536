"""The one exception that stands for a user's mistake or a fault of their surroundings, never for a bug; and checks of
values that raise it."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class UserError(Exception):
    """Printed as one line without a traceback. The message names the key, its value and what is allowed."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def out_of_memory(error: Exception) -> bool:
    """Whether memory was short, the machine's or a GPU's: torch raises a plain RuntimeError for the machine's."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in str(error) or "can't allocate memory" in str(error))
    )


def first_line(error: Exception) -> str:
    """What went wrong, in a line; the exception's name where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """A mistake, or memory that is short, ends the process with one line; so does an interrupt, in silence."""
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {error}")
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        sys.exit(f"error: out of memory ({first_line(error)}); use a smaller model, or a larger device")
    except KeyboardInterrupt:
        sys.exit(130)


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
