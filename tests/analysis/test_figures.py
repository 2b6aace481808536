"""Figures: what is in them is measured, and styles like itself."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from made import Record, layer_rows, record, score
from matplotlib.colors import to_rgb

from analysis import latency_figures, quality_figures
from analysis.drawing import Drawing, Group, Styles
from analysis.flocking_figures import flocking
from analysis.frame import frame
from analysis.metrics import metric
from analysis.runs import Runs
from pipelines.figure_style import LIGHT, NEUTRAL, drawn_in


def drawn(drawing: Drawing) -> dict[str, tuple[list[float], list[float], str]]:
    """The lines with a name: (x, y, colour)."""
    with drawn_in(LIGHT):
        axis = drawing.draw().axes[0]
    handles, names = axis.get_legend_handles_labels()
    lines = [getattr(handle, "lines", (handle,))[0] for handle in handles]
    return {
        name: (np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist(), line.get_color())
        for name, line in zip(names, lines, strict=True)
    }


def only(group: Group) -> Drawing:
    (drawing,) = group.drawings
    return drawing


def sweep(**scores: dict[float, float]) -> list[Record]:
    return [
        record(f"{statistic}-{sparsity}", sparsity=sparsity, statistic=statistic, metrics=score(value))
        for statistic, values in scores.items()
        for sparsity, value in values.items()
    ]


def test_a_line_begins_at_dense_and_has_every_point_of_its_method() -> None:
    runs = frame(sweep(griffin={0: 20.0, 0.25: 19.0, 0.5: 15.0}, wanda={0.25: 18.0, 0.5: 12.0}))
    drawing = only(quality_figures.against_sparsity(runs, Styles(runs["family"])))
    lines = drawn(drawing)
    assert lines["griffin"][:2] == ([0.0, 25.0, 50.0], [20.0, 19.0, 15.0])
    assert lines["wanda"][:2] == ([0.0, 25.0, 50.0], [20.0, 18.0, 12.0])
    assert lines["dense"][1] == [20.0, 20.0]
    assert set(drawing.run_ids) == set(runs["run_id"])


def test_a_missing_point_is_a_gap() -> None:
    runs = frame(sweep(griffin={0: 20.0, 0.25: 19.0, 0.5: 15.0, 0.75: 9.0}, wanda={0.25: 18.0, 0.75: 3.0}))
    lines = drawn(only(quality_figures.against_sparsity(runs, Styles(runs["family"]))))
    assert [math.isnan(value) for value in lines["wanda"][1]] == [False, False, True, False]


def test_protocols_and_limits_have_figures_of_their_own() -> None:
    records = [
        *sweep(griffin={0: 20.0, 0.25: 17.0, 0.5: 15.0}),
        *(record(f"other-{sparsity}", sparsity=sparsity, metrics=score(3.0), limit=10) for sparsity in (0.25, 0.5)),
    ]
    runs = frame(records)
    group = quality_figures.against_sparsity(runs, Styles(runs["family"]))
    assert sorted(len(drawing.run_ids) for drawing in group.drawings) == [2, 3]


def test_a_single_point_is_left_to_the_tables() -> None:
    fast = {"decode_speedup": 1.4, "decode_limit": 1.5, "samples": 3}
    runs = frame([*sweep(griffin={0: 20.0, 0.5: 15.0}), record("fast", "latency", metrics=fast)])
    styles = Styles(runs["family"])
    for draw in (quality_figures.against_sparsity, quality_figures.against_speed, latency_figures.bars):
        assert draw(runs, styles).drawings == []


def test_the_dashed_line_is_explained_where_there_is_one() -> None:
    for first, explained in ((0, True), (0.25, False)):
        runs = frame(sweep(griffin={first: 20.0, 0.5: 15.0, 0.75: 12.0}))
        group = quality_figures.against_sparsity(runs, Styles(runs["family"]))
        assert ("dashed" in group.note) is explained
        assert ("dense" in drawn(only(group))) is explained


def test_error_bars_of_perplexity_stay_above_zero() -> None:
    metrics = {"perplexity": 10.0, "perplexity_stderr": 12.0, "samples": 2}
    runs = frame([record(f"p-{sparsity}", "perplexity", sparsity, metrics=metrics) for sparsity in (0.25, 0.5)])
    with drawn_in(LIGHT):
        axis = only(quality_figures.against_sparsity(runs, Styles(runs["family"]))).draw().axes[0]
    (bars,) = axis.containers[0].lines[2]
    low, high = bars.get_segments()[0][:, 1]
    assert low == pytest.approx(10 / math.exp(1.2))
    assert high == pytest.approx(10 * math.exp(1.2))


def test_speed_meets_quality_only_for_the_same_model_and_method() -> None:
    fast = {"decode_speedup": 1.4, "decode_limit": 1.5, "samples": 3}
    records = [
        *sweep(griffin={0: 20.0, 0.5: 15.0}, wanda={0.5: 12.0}),
        record("fast", "latency", metrics=fast),
        record("faster", "latency", metrics=fast | {"decode_speedup": 1.5}, statistic="wanda"),
        record("another", "latency", metrics=fast, statistic="wanda", model_name="llama2_7b"),
    ]
    runs = frame(records)
    drawing = only(quality_figures.against_speed(runs, Styles(runs["family"])))
    assert set(drawing.run_ids) == {"griffin-0", "griffin-0.5", "fast", "wanda-0.5", "faster"}
    lines = drawn(drawing)
    assert lines["griffin"][:2] == ([1.4], [15.0])
    assert lines["wanda"][:2] == ([1.5], [12.0])
    assert lines["dense"][:2] == ([1.0], [20.0])


def test_predicted_speed_has_a_line_a_method_and_one_at_dense() -> None:
    def predictions(statistic: str, values: dict[float, float]) -> list[Record]:
        return [
            record(
                f"{statistic}-{sparsity}",
                "fidelity",
                sparsity=sparsity,
                statistic=statistic,
                metrics=score(0.1, name="kl") | {"predicted_speedup": value},
            )
            for sparsity, value in values.items()
        ]

    runs = frame([*predictions("griffin", {0.25: 1.1, 0.5: 1.3}), *predictions("wanda", {0.25: 0.9, 0.5: 1.0})])
    drawing = only(quality_figures.predicted_speed(runs, Styles(runs["family"])))
    lines = drawn(drawing)
    assert lines["griffin"][:2] == ([25.0, 50.0], [1.1, 1.3])
    assert lines["wanda"][:2] == ([25.0, 50.0], [0.9, 1.0])
    assert lines["dense"][1] == [1.0, 1.0]
    assert set(drawing.run_ids) == set(runs["run_id"])
    runs = frame(predictions("griffin", {0.5: 1.3}))
    assert quality_figures.predicted_speed(runs, Styles(runs["family"])).drawings == []


def test_one_method_has_one_colour_in_all_figures() -> None:
    fast = {"decode_speedup": 1.4, "decode_limit": 1.5, "samples": 3}
    timed = [record(f"fast-{name}", "latency", metrics=fast, statistic=name) for name in ("griffin", "random")]
    runs = frame([*sweep(griffin={0: 20.0, 0.5: 15.0}, random={0.5: 12.0}), *timed])
    styles = Styles(runs["family"])
    sparsity = drawn(only(quality_figures.against_sparsity(runs, styles)))
    speed = drawn(only(quality_figures.against_speed(runs, styles)))
    assert sparsity["griffin"][2] == speed["griffin"][2] == styles.colour("griffin")
    assert sparsity["dense"][2] == speed["dense"][2] == NEUTRAL
    with drawn_in(LIGHT):
        figure = only(latency_figures.bars(runs, styles)).draw()
    bar, _ = figure.axes[0].patches
    assert bar.get_width() == 1.4
    assert tuple(round(255 * part) for part in bar.get_facecolor()[:3]) == tuple(
        int(styles.colour("griffin")[place : place + 2], 16) for place in (1, 3, 5)
    )


def test_flocking_runs_from_wandb_have_curves_but_no_heatmaps() -> None:
    runs = Runs([record("a", "flocking", sparsity=0)], [], layers={"a": layer_rows()})
    names = [drawing.name for drawing in flocking(runs, {"a": ("model", "text")}).drawings]
    assert names == [f"flocking_jaccard_{measure}_model_text" for measure in ("sequences", "halves", "generation")]


def test_axes_name_their_units() -> None:
    runs = frame(sweep(griffin={0.25: 20.0, 0.5: 15.0}))
    with drawn_in(LIGHT):
        axis = only(quality_figures.against_sparsity(runs, Styles(runs["family"]))).draw().axes[0]
    assert axis.get_xlabel() == "FF sparsity (%)"
    assert axis.get_ylabel() == metric("rouge1").axis == "ROUGE-1 (F x 100), higher is better"


# Full deuteranopia and protanopia, on linear RGB (Machado, Oliveira and Fernandes, IEEE TVCG 2009).
_VISION = {
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
}
_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def seen(colour: str, vision: str) -> np.ndarray:
    """The colour in CIELAB, as such eyes see it."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = _TO_XYZ @ np.clip(np.array(_VISION[vision]) @ linear, 0, 1) / np.array([0.9505, 1.0, 1.089])
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", _VISION)
def test_the_colour_blind_tell_methods_apart(vision: str) -> None:
    families = ("dense", "griffin", "magnitude", "wanda", "random", "impact", "griffin+ridge", "impact+ridge")
    styles = Styles(families)
    colours = [seen(styles.colour(family), vision) for family in families]
    for one, other in itertools.combinations(colours, 2):
        assert np.linalg.norm(one - other) > 10  # about 2 can just be told apart, side by side
    assert len({styles.marker(family) for family in families}) == len(families)
