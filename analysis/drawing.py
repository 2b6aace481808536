"""What a report's figures have in common: a drawing that can be made in any theme, and one colour for one method."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.figure_style import COLOURS, LIGHT, MARKERS, NEUTRAL, drawn_in

# These have the same colour in every report; other methods take the next that is free, by name.
_KNOWN = ("griffin", "magnitude", "wanda", "random", "impact", "griffin + ridge", "impact + ridge", "griffin + mean")
_COLOURS = [colour for number, colour in enumerate(COLOURS) if number != 7]  # without the grey of dense
_INSIDE = 6  # lines of a legend that fit beside the data


@dataclass(frozen=True)
class Drawing:
    """A figure, ready to be drawn.

    Attributes:
        name: of its files.
        title: for people.
        caption: what it shows, in a sentence or two.
        run_ids: the runs whose numbers are in it.
        draw: draws it in the theme that is on.
    """

    name: str
    title: str
    caption: str
    run_ids: tuple[str, ...]
    draw: Callable[[], Figure]

    def _repr_png_(self) -> bytes:
        """How a notebook shows it."""
        out = io.BytesIO()
        with drawn_in(LIGHT):
            self.draw().savefig(out, format="png", dpi=130)
        return out.getvalue()


@dataclass(frozen=True)
class Group:
    """Figures of one kind.

    Attributes:
        title: for people.
        drawings: in order; empty where the runs have no data for any.
        command: what would make the data.
        hint: what to put into the command.
        looks: whether the figures show what the model does, and not what a method achieves.
    """

    title: str
    drawings: list[Drawing]
    command: str
    hint: str = ""
    looks: bool = False


class Looks:
    """Colour and marker of every method, the same in all figures of a report."""

    def __init__(self, families: Iterable[str]) -> None:
        present = {*families} - {"dense"}
        self._place = {family: place for place, family in enumerate(_KNOWN) if family in present}
        others = sorted(present - {*_KNOWN})
        places = (*range(len(_COLOURS)), *range(len(_COLOURS), len(_COLOURS) + len(others)))
        free = (place for place in places if place not in self._place.values())
        self._place |= dict(zip(others, free, strict=False))

    def colour(self, family: str) -> str:
        """As a hexadecimal code; of more methods than there are colours, some differ in their markers alone."""
        return NEUTRAL if family == "dense" else _COLOURS[self._place[family] % len(_COLOURS)]

    def marker(self, family: str) -> str:
        """As matplotlib names it."""
        return "*" if family == "dense" else MARKERS[self._place[family] % len(MARKERS)]


def add_legend(figure: Figure, axis: Axes) -> None:
    """A legend inside the axes, or, of more methods than leave room there, below them on a taller figure."""
    handles, labels = axis.get_legend_handles_labels()
    if len(labels) <= _INSIDE:
        axis.legend()
        return
    figure.set_figheight(figure.get_figheight() + 0.22 * len(labels))
    figure.legend(handles, labels, loc="outside lower center")


def file_name(*words: str) -> str:
    """Words as a file name, which other words may have too."""
    return "_".join("".join(c if c.isalnum() or c in ".-" else "_" for c in word).strip("_") for word in words)[:120]


def named_apart(groups: Sequence[Group]) -> list[Group]:
    """The same groups, with numbers at the ends of names that several drawings have."""
    seen: Counter[str] = Counter()

    def named(drawing: Drawing) -> Drawing:
        seen[drawing.name] += 1
        number = seen[drawing.name]
        return drawing if number == 1 else replace(drawing, name=f"{drawing.name}_{number}")

    return [replace(group, drawings=[named(drawing) for drawing in group.drawings]) for group in groups]
