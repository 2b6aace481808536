"""How a key is described and checked; the keys of a method, made from the fields of `griffin.Method`; and the methods
that a call's keys stand for.

An axis is said in `griffin.Method` and nowhere else: its type, values, default and help are taken from there, and what
goes with what is what `Method` does not refuse.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import Field, field, fields, make_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import MISSING

from griffin import METHODS, Method
from pipelines.errors import UserError, at_least, one_of

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


AXES: dict[str, Field[Any]] = {axis.name: axis for axis in fields(Method)}


def _type(axis: Field[Any]) -> Any:
    """The axis's type as the configuration may have it, which knows no unions and no statistics of one's own."""
    hint = get_type_hints(Method)[axis.name]
    return hint if hint in (str, bool, int, float) else str if axis.metadata["values"] else Any


def help_of(axis: Field[Any]) -> str:
    """What an axis means, and what it may be."""
    text, values = axis.metadata["help"], axis.metadata["values"]
    return text if all(value in text for value in values) else f"{text}: {', '.join(values)}"


MethodKeys: Any = make_dataclass(
    "MethodKeys",
    [(name, _type(axis), described(help_of(axis), axis.default)) for name, axis in AXES.items()],
    namespace={"__module__": __name__, "__doc__": "How a run prunes."},
)

GridConfig: Any = make_dataclass(
    "GridConfig",
    [
        ("method", list[str], described(f"named methods, on top of which single keys go: {', '.join(METHODS)}", list)),
        *((name, list[_type(axis)], described(f"values of {name}", list)) for name, axis in AXES.items()),  # type: ignore[misc]
    ],
    namespace={
        "__module__": __name__,
        "__doc__": "Several methods in one process: every possible combination of the lists. Empty: the root's own.",
    },
)


def planned(config: Any) -> list[Method]:
    """The methods of a call, dense first: every combination of its keys that `Method` takes, each once.

    All that neither prune nor quantise are the one dense method. A value that goes with none of the others raises
    UserError.
    """
    for name in config.grid.method:
        one_of("grid.method", name, tuple(METHODS))
    for name, axis in AXES.items():
        listed = getattr(config.grid, name)
        for value in (listed or [getattr(config, name)]) if axis.metadata["values"] else ():
            one_of(f"grid.{name}" if listed else name, value, axis.metadata["values"])
    named = [METHODS[name] for name in config.grid.method]
    # Of the grid's values where it has any, else the root's where it was set, else those of the named method.
    points = [
        dict(zip(AXES, point, strict=True))
        for base in named or [Method()]
        if not (named and base.dense)
        for point in itertools.product(
            *(
                getattr(config.grid, name)
                or [getattr(base, name) if getattr(config, name) == axis.default else getattr(config, name)]
                for name, axis in AXES.items()
            )
        )
    ]
    pruned = [point for point in points if not _is_dense(point)]
    taken: list[dict[str, Any]] = []
    refused: list[tuple[dict[str, Any], str]] = []
    methods: dict[Method, None] = {}
    for point in pruned or points:
        try:
            method = Method(**point)
        except (ValueError, TypeError) as error:
            refused.append((point, str(error)))
        else:
            taken.append(point)
            methods[Method(**method.settings)] = None
    for point, refusal in refused:  # a value that goes with nothing is a mistake, and no gap of the grid
        if any(all(other[name] != value for other in taken) for name, value in point.items()):
            raise UserError(as_typed(refusal, [name for name in AXES if getattr(config.grid, name)]))
    if len(pruned) < len(points) or any(base.dense for base in named):
        return [Method(sparsity=0.0), *(method for method in methods if not method.dense)]
    return list(methods)


def _is_dense(point: dict[str, Any]) -> bool:
    sparsity = point["sparsity"]
    several = isinstance(sparsity, list | tuple) and bool(sparsity)
    return point["quantization"] == "none" and (not any(sparsity) if several else sparsity == 0)


def as_typed(refusal: str, listed: Sequence[str] = ()) -> str:
    """A refusal of `Method` as the command line says it: without quotes, and with `grid.` before what is from it."""
    setting, colon, allowed = re.sub(r"='([^']*)'", r"=\1", refusal).replace("=None", "=null").partition(": ")
    for name in listed:
        setting = re.sub(rf"\b{name}=", f"grid.{name}=", setting)
    return setting + colon + allowed
