"""The one exception that stands for a user's mistake or a fault of their surroundings, never for a bug."""


class UserError(Exception):
    """Printed as one line without a traceback. The message names the key, its value and what is allowed."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
