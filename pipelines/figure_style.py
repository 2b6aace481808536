"""How figures look, in run folders and in reports: one column wide, so that they can be read on a phone and in print.

Colours are seaborn's palette for the colour-blind; lines differ in their markers too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import seaborn as sns
from cycler import cycler
from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.4, 3.1  # inches
COLOURS = sns.color_palette("colorblind", 10).as_hex()
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "p")
NEUTRAL = "#7d8590"  # of dense and of limits: what all others are read against; clear on white and on black

logging.getLogger("fontTools").setLevel(logging.WARNING)  # tells every glyph that a PDF embeds


@dataclass(frozen=True)
class Theme:
    """Light or dark.

    Attributes:
        ink: of text and axes.
        grid: of grid lines.
        paper: what lies behind; figures in a page are transparent.
        heat: a sequential colour map whose zero is the paper's colour.
    """

    ink: str
    grid: str
    paper: str
    heat: str


LIGHT = Theme(ink="#1f2328", grid="#e4e8ec", paper="#ffffff", heat="mako_r")
DARK = Theme(ink="#e6edf3", grid="#2b323b", paper="#161b22", heat="mako")


@contextmanager
def drawn_in(theme: Theme) -> Iterator[None]:
    """Figures that are made and saved inside look like this theme, and are the same bytes every time."""
    options: dict[Any, Any] = {
        "font.family": "DejaVu Sans",  # comes with matplotlib
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.labelsize": 9,
        "legend.fontsize": 8,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=COLOURS),
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "lines.markersize": 5,
        "figure.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "grid.color": theme.grid,
        "image.cmap": theme.heat,
        "svg.hashsalt": "griffin",
        "text.parse_math": False,  # a name may hold dollar signs
    }
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
    with mpl.rc_context(options | dict.fromkeys(inked, theme.ink)):
        yield


def new_figure(height: float = HEIGHT, **grid: Any) -> tuple[Figure, Any]:
    """An empty figure of the usual width, without pyplot's list of all figures, and its axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(**grid)


def save(figure: Figure, path: Path) -> Path:
    """Write `path`.png and `path`.pdf, and return the former. The layout is settled by then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    png = path.with_suffix(".png")
    figure.savefig(png, dpi=200)
    figure.set_layout_engine("none")  # finding it takes longer than drawing
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
    return png
