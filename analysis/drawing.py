"""What all figures of a report share: a description of each figure, and one colour and marker per method."""

from __future__ import annotations

import io
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.figure_style import COLOURS, MARKERS, NEUTRAL, styled

# These families have the same colour in every report. Every other family gets the next free colour, by name.
_KNOWN = ("griffin", "magnitude", "wanda", "random", "recipe", "exact", "int8", "int4")
_COLOURS = [colour for number, colour in enumerate(COLOURS) if number != 7]  # number 7 is a grey, like dense
MOST_SHOWN = 12  # figures of a kind, and tasks with examples, in a report: nobody looks at hundreds
DENSE_LINE = {"color": NEUTRAL, "linestyle": "--", "linewidth": 1.2, "label": "dense"}
_INSIDE = 6  # a legend with more entries is placed below the axes


@dataclass(frozen=True)
class Drawing:
    """A figure of some runs that has not been drawn yet. Its caption tells what its group's note does not; its name is
    that of its file, without suffix."""

    name: str
    title: str
    run_ids: Sequence[str]
    draw: Callable[[], Figure]
    caption: str = ""

    def _repr_png_(self) -> bytes:
        """Notebooks call this to show the figure."""
        out = io.BytesIO()
        with styled():
            self.draw().savefig(out, format="png", dpi=130)
        return out.getvalue()


@dataclass(frozen=True)
class Group:
    """Figures of one kind; empty if no run has data for them.

    Attributes:
        command: its runs give the data.
        note: what all figures show, and how they are read.
        hint: what the user must fill into the command.
    """

    title: str
    drawings: list[Drawing]
    command: str
    note: str = ""
    hint: str = ""


class Styles:
    """Colour and marker of every method, the same in all figures of a report.

    Args:
        families: the methods without their sparsities; repeated ones count once. Dense is neutral, as is all else.
    """

    def __init__(self, families: Iterable[str]) -> None:
        present = {family for family in families if family.partition(" [")[0] != "dense"}
        self._place = {family: place for place, family in enumerate(_KNOWN) if family in present}
        others = sorted(present - {*_KNOWN})
        used = {*self._place.values()}
        free = (place for place in itertools.count() if place not in used)
        self._place |= dict(zip(others, free, strict=False))

    def colour(self, family: str) -> str:
        """A hexadecimal code. With more methods than colours, some methods differ only in their markers."""
        return NEUTRAL if family not in self._place else _COLOURS[self._place[family] % len(_COLOURS)]

    def marker(self, family: str) -> str:
        """A marker in matplotlib's notation."""
        return "*" if family not in self._place else MARKERS[self._place[family] % len(MARKERS)]

    def points(self, family: str) -> dict[str, Any]:
        """How matplotlib's `errorbar` draws the points of a method."""
        looks = {"color": self.colour(family), "marker": self.marker(family), "label": family}
        return looks | {"capsize": 2, "elinewidth": 1}


def add_legend(figure: Figure, axis: Axes, *, inside: bool = True) -> None:
    """Add a legend: inside the axes if it may be and is short, else below them, and make the figure higher for it."""
    handles, labels = axis.get_legend_handles_labels()
    if inside and len(labels) <= _INSIDE:
        axis.legend()
        return
    figure.set_figheight(figure.get_figheight() + 0.22 * len(labels))
    figure.legend(handles, labels, loc="outside lower center")


def name_sparsities(axis: Axes, across: Iterable[float], up: Iterable[float], sparsities: Iterable[float]) -> None:
    """Write the sparsity of every point beside it, in %."""
    for x, y, sparsity in zip(across, up, sparsities, strict=True):
        text = "per layer" if math.isnan(sparsity) else f"{100 * sparsity:g}"
        axis.annotate(text, (x, y), (4, 4), textcoords="offset points", fontsize=8)


def drawing(
    words: Sequence[str], title: str, run_ids: Iterable[str], draw: Callable[[], Figure], caption: str = ""
) -> Drawing:
    """A drawing whose file is named by words; run ids may be repeated."""
    return Drawing(file_name(*words), title, [*dict.fromkeys(run_ids)], draw, caption)


def file_name(*words: str) -> str:
    """Words as a file name. Different words may give the same name."""
    return "_".join("".join(c if c.isalnum() or c in ".-" else "_" for c in word).strip("_") for word in words)[:120]


def numbered(group: Group) -> Group:
    """The group with its first `MOST_SHOWN` drawings, where those of the same name are numbered; its note says how many
    more there would be."""
    seen: Counter[str] = Counter()
    drawings = []
    for drawing in group.drawings[:MOST_SHOWN]:
        seen[drawing.name] += 1
        number = seen[drawing.name]
        drawings.append(drawing if number == 1 else replace(drawing, name=f"{drawing.name}_{number}"))
    more = len(group.drawings) - MOST_SHOWN
    words = f" {more} more are not drawn: choose with model=, task= or method=." if more > 0 else ""
    return replace(group, drawings=drawings, note=group.note + words)
