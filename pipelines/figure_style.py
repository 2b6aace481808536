"""How figures look, in run folders and in reports: one column wide, so that they can be read on a phone and in print.

Colours are seaborn's palette for the colour-blind; lines differ in their markers too.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
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


INK, GRID, PAPER = "#1f2328", "#e4e8ec", "#ffffff"
# What these are in the dark. All other colours are clear on white and on black.
_DARK = {INK: "#e6edf3", GRID: "#2b323b", PAPER: "#161b22"}


@contextmanager
def styled() -> Iterator[None]:
    """Figures that are made and saved inside look alike, and are the same bytes every time."""
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
        "figure.facecolor": PAPER,
        "axes.facecolor": PAPER,
        "savefig.facecolor": PAPER,
        "grid.color": GRID,
        "image.cmap": "mako_r",  # its zero is pale, on dark pages too
        "svg.hashsalt": "griffin",
        "text.parse_math": False,  # a name may hold dollar signs
    }
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
    with mpl.rc_context(options | dict.fromkeys(inked, INK)):
        yield


def new_figure(height: float = HEIGHT, **grid: Any) -> tuple[Figure, Any]:
    """An empty figure of the usual width, without pyplot's list of all figures, and its axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(**grid)


def themed(figure: Figure) -> tuple[str, str]:
    """The figure as SVG with nothing behind it, for light pages and for dark ones: it is drawn once."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    dark = light = out.getvalue()
    for colour, other in _DARK.items():
        dark = dark.replace(colour, other)
    return light, dark


def save(figure: Figure, path: Path) -> Path:
    """Write `path`.png and `path`.pdf, and return the former. The layout is settled by then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    png = path.with_suffix(".png")
    figure.savefig(png, dpi=200)
    figure.set_layout_engine("none")  # finding it takes longer than drawing
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
    return png
