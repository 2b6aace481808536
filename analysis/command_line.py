"""Arguments of the form KEY=VALUE, which all commands of the analysis take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipelines.errors import UserError, did_you_mean


def key_values(
    arguments: Sequence[str], usage: str, keys: Mapping[str, str], defaults: Mapping[str, str]
) -> dict[str, str]:
    """The values by their keys, of which those without a default must be given. `--help` prints the usage and what each
    key means, and ends the process.

    Raises:
        UserError: an argument has no value, or a key is unknown or missing.
    """
    given = dict(defaults)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if argument in ("-h", "--help"):
            print("\n".join([usage, "", *(f"  {key:8}{text}" for key, text in keys.items())]))
            raise SystemExit(0)
        if not equals:
            raise UserError(f"{argument}: expected KEY=VALUE, as in {usage}")
        if key not in keys:
            raise UserError(f"{key}: no such key{did_you_mean(key, keys)}; expected {', '.join(keys)}")
        given[key] = value
    for key in keys.keys() - defaults.keys():
        if not given.get(key, "").strip():
            raise UserError(f"{key}=: expected a {keys[key]}, as in {usage}")
    return given
