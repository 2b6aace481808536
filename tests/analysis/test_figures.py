"""Figures: what is in them is measured, and styles like itself."""

import itertools
import math
from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
import pytest
from made import FAST, Record, layer_rows, record, score
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb

from analysis.drawing import Drawing, Group, Styles
from analysis.figures import against_sparsity, against_speed, flocking, latency, predicted_speed
from analysis.frame import frame
from analysis.metrics import metric
from analysis.runs import Runs
from pipelines.figure_style import NEUTRAL, styled

LATENCY = ("latency", 0.5)


def group(make: Callable[[pd.DataFrame, Styles], Group], records: Iterable[Record]) -> Group:
    runs = frame([*records])
    return make(runs, Styles(runs["family"]))


def only(make: Callable[[pd.DataFrame, Styles], Group], records: Iterable[Record]) -> Drawing:
    (drawing,) = group(make, records).drawings
    return drawing


def axes(drawing: Drawing) -> Axes:
    with styled():
        return drawing.draw().axes[0]


def drawn(drawing: Drawing) -> dict[str, tuple[list[float], list[float], str]]:
    """The lines with a name: (x, y, colour)."""
    handles, names = axes(drawing).get_legend_handles_labels()
    lines = [getattr(handle, "lines", (handle,))[0] for handle in handles]
    return {
        name: (np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist(), line.get_color())
        for name, line in zip(names, lines, strict=True)
    }


def sweep(kind: str = "generation", name: str = "rouge1", **scores: dict[float, float]) -> list[Record]:
    return [
        record(f"{statistic}-{sparsity}", kind, sparsity, statistic=statistic, metrics=score(value, name=name))
        for statistic, values in scores.items()
        for sparsity, value in values.items()
    ]


def test_a_line_begins_at_dense_and_has_every_point_of_its_method() -> None:
    records = sweep(griffin={0: 20.0, 0.25: 19.0, 0.5: 15.0}, wanda={0.25: 18.0, 0.5: 12.0})
    drawing = only(against_sparsity, records)
    lines = drawn(drawing)
    assert lines["griffin"][:2] == ([0.0, 25.0, 50.0], [20.0, 19.0, 15.0])
    assert lines["wanda"][:2] == ([0.0, 25.0, 50.0], [20.0, 18.0, 12.0])
    assert lines["dense"][1] == [20.0, 20.0]
    assert set(drawing.run_ids) == {one["run_id"] for one in records}
    axis = axes(drawing)
    assert axis.get_xlabel() == "FF sparsity (%)"
    assert axis.get_ylabel() == metric("rouge1").axis == "ROUGE-1 (F x 100), higher is better"


def test_a_quantised_copy_has_its_own_point_where_nothing_is_pruned() -> None:
    copies = [record("int8", sparsity=0, quantization="int8", metrics=score(19.5))]
    lines = drawn(only(against_sparsity, [*sweep(griffin={0: 20.0, 0.5: 15.0}), *copies]))
    assert lines["int8"][1][0] == 19.5
    assert lines["griffin"][1] == [20.0, 15.0]


def test_of_several_dense_runs_a_line_begins_at_the_nearest() -> None:
    dense = [record(f"dense-{size}", sparsity=0, batch_size=size, metrics=score(10.0 * size)) for size in (1, 2)]
    pruned = [record(f"{part}", sparsity=part, batch_size=2, metrics=score(9.0)) for part in (0.25, 0.5)]
    lines = drawn(only(against_sparsity, [*dense, *pruned]))
    assert lines["griffin"][:2] == ([0.0, 25.0, 50.0], [20.0, 9.0, 9.0])


def test_a_missing_point_is_a_gap() -> None:
    records = sweep(griffin={0: 20.0, 0.25: 19.0, 0.5: 15.0, 0.75: 9.0}, wanda={0.25: 18.0, 0.75: 3.0})
    wanda = drawn(only(against_sparsity, records))["wanda"]
    assert [math.isnan(value) for value in wanda[1]] == [False, False, True, False]


def test_protocols_and_limits_have_figures_of_their_own() -> None:
    other = (record(f"other-{part}", sparsity=part, metrics=score(3.0), limit=10) for part in (0.25, 0.5))
    found = group(against_sparsity, [*sweep(griffin={0: 20.0, 0.25: 17.0, 0.5: 15.0}), *other])
    assert sorted(len(drawing.run_ids) for drawing in found.drawings) == [2, 3]


@pytest.mark.parametrize("make", [against_sparsity, against_speed, latency, predicted_speed])
def test_a_single_point_is_left_to_the_tables(make: Callable[[pd.DataFrame, Styles], Group]) -> None:
    records = [*sweep(griffin={0: 20.0, 0.5: 15.0}), record("fast", *LATENCY, metrics=FAST)]
    predicted = record("kl", "fidelity", metrics=score(1.3, name="predicted_speedup"))
    assert group(make, [*records, predicted]).drawings == []


@pytest.mark.parametrize(("first", "explained"), [(0, True), (0.25, False)])
def test_the_dashed_line_is_explained_where_there_is_one(first: float, explained: bool) -> None:
    found = group(against_sparsity, sweep(griffin={first: 20.0, 0.5: 15.0, 0.75: 12.0}))
    assert ("dashed" in found.note) is ("dense" in drawn(found.drawings[0])) is explained


def test_error_bars_of_perplexity_stay_above_zero() -> None:
    metrics = score(10.0, 12.0, "perplexity")
    runs = [record(f"p-{sparsity}", "perplexity", sparsity, metrics=metrics) for sparsity in (0.25, 0.5)]
    (bars,) = axes(only(against_sparsity, runs)).containers[0].lines[2]
    assert bars.get_segments()[0][:, 1] == pytest.approx([10 / math.exp(1.2), 10 * math.exp(1.2)])


def test_speed_meets_quality_only_for_the_same_model_and_method() -> None:
    records = [
        *sweep(griffin={0: 20.0, 0.5: 15.0}, wanda={0.5: 12.0}),
        record("fast", *LATENCY, metrics=FAST),
        record("faster", *LATENCY, metrics=FAST | {"decode_speedup": 1.5}, statistic="wanda"),
        record("another", *LATENCY, metrics=FAST, statistic="wanda", model_name="llama2_7b"),
    ]
    drawing = only(against_speed, records)
    assert set(drawing.run_ids) == {"griffin-0", "griffin-0.5", "fast", "wanda-0.5", "faster"}
    points = {name: line[:2] for name, line in drawn(drawing).items()}
    assert points == {"griffin": ([1.4], [15.0]), "wanda": ([1.5], [12.0]), "dense": ([1.0], [20.0])}


def test_predicted_speed_has_a_line_a_method_and_one_at_dense() -> None:
    values = {"griffin": {0.25: 1.1, 0.5: 1.3}, "wanda": {0.25: 0.9, 0.5: 1.0}}
    records = sweep("fidelity", "predicted_speedup", **values)
    drawing = only(predicted_speed, records)
    lines = drawn(drawing)
    for method, predicted in values.items():
        assert lines[method][:2] == ([25.0, 50.0], [*predicted.values()])
    assert lines["dense"][1] == [1.0, 1.0]
    assert set(drawing.run_ids) == {one["run_id"] for one in records}


def test_one_method_has_one_colour_in_all_figures() -> None:
    timed = [record(f"fast-{name}", *LATENCY, metrics=FAST, statistic=name) for name in ("griffin", "random")]
    runs = [*sweep(griffin={0: 20.0, 0.5: 15.0}, random={0.5: 12.0}), *timed]
    sparsity, speed = (drawn(only(make, runs)) for make in (against_sparsity, against_speed))
    griffin = Styles(["griffin", "random"]).colour("griffin")
    assert sparsity["griffin"][2] == speed["griffin"][2] == griffin
    assert sparsity["dense"][2] == speed["dense"][2] == NEUTRAL
    bar, _ = axes(only(latency, runs)).patches
    assert (bar.get_width(), to_hex(bar.get_facecolor())) == (1.4, griffin)


def test_bars_stand_by_method_and_rising_sparsity_with_those_that_differ_by_layer_last() -> None:
    shares = (0.75, [0.5, 0.25], 0.25)
    axis = axes(only(latency, (record(f"{part}", "latency", part, metrics=FAST) for part in shares)))
    assert [label.get_text() for label in axis.get_yticklabels()] == ["griffin 25%", "griffin 75%", "griffin per layer"]


def test_flocking_runs_from_wandb_have_curves_but_no_heatmaps() -> None:
    runs = Runs([record("a", "flocking", sparsity=0)], [], layers={"a": layer_rows()})
    names = [drawing.name.removeprefix("flocking_jaccard_") for drawing in flocking(runs).drawings]
    assert names == [f"{measure}_gemma_7b_flocking" for measure in ("sequences", "halves", "generation")]


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
