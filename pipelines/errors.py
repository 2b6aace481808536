"""The one exception that stands for a user's mistake or a fault of their surroundings, never for a bug."""


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
