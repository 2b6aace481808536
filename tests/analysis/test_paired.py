"""Methods compared sample by sample: differences, intervals, critical sparsities, and the leaderboard."""

import math
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
from calling import process
from made import FAST, record, score, write_run

from analysis.contents import make_report
from analysis.leaderboard import leaderboard
from analysis.output import write_report
from analysis.paired import compare
from analysis.tables import Cell
from pipelines.errors import UserError


def scores(values: Sequence[float]) -> dict[int, float]:
    return dict(enumerate(map(float, values)))


def write(root: Path, run_id: str, values: Sequence[float], **more: Any) -> None:
    """A finished run of question answering whose samples have these scores, right or wrong."""
    tokens, first = more.pop("tokens", 10), more.pop("first", 0)
    drafting = {"effective_density": more.pop("density")} if "density" in more else {}
    metrics = score(fmean(values), stdev(values) / math.sqrt(len(values)), "exact_match") | drafting
    settings = {"task_name": "gsm8k", "task_decoding": None, "task_shots": 5} | more
    samples = [
        {"index": index, "generated_tokens": tokens, "metrics": {"exact_match": value}}
        for index, value in enumerate(values, first)
    ]
    write_run(root, record(run_id, metrics=metrics | {"samples": len(values)}, **settings), samples)


RIGHT = [1.0] * 60 + [0.0] * 40


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Dense, GRIFFIN at three sparsities that loses nothing, one point and thirty, and a better method."""
    root = tmp_path / "runs"
    write(root, "dense", RIGHT, sparsity=0)
    write(root, "griffin-25", [*RIGHT[:-1], 1.0], sparsity=0.25, density=0.85, tokens=11)
    write(root, "griffin-50", [0.0, *RIGHT[1:]], sparsity=0.5, density=0.7, tokens=15)
    write(root, "griffin-75", [0.0] * 30 + RIGHT[30:], sparsity=0.75, density=0.55, tokens=20)
    write(root, "joint-75", [0.0] * 10 + RIGHT[10:], sparsity=0.75, statistic="joint", density=0.55)
    return root


# -- one difference ---------------------------------------------------------------------------------------------------


def test_a_difference_is_in_points_of_the_largest_score() -> None:
    found = compare(scores([1, 1, 0, 0]), scores([1, 0, 0, 0]), largest=1.0)
    assert (found.samples, found.mean) == (4, 25.0)
    rouge = compare(scores([30.0, 20.0]), scores([20.0, 20.0]), largest=100.0)
    assert (rouge.mean, rouge.p) == (5.0, None), "ROUGE is neither right nor wrong"


def test_the_interval_is_that_of_the_paired_bootstrap() -> None:
    """As resampling by hand; and narrower than one of samples that are not paired."""
    random = np.random.default_rng(1)
    others = random.normal(50, 20, 200)
    mine = others + random.normal(2, 3, 200)
    found = compare(scores(mine), scores(others), largest=100.0)
    drawn = (mine - others)[np.random.default_rng(2).integers(0, 200, (4000, 200))].mean(axis=1)
    assert (found.low, found.high) == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.05)
    assert found.low < found.mean < found.high
    assert found.high - found.low < 1


def test_mcnemar_counts_where_the_two_differ() -> None:
    """Nine answers lost and one won: 2 * P(at most one of ten) = 22 / 1024."""
    mine, others = scores([0] * 9 + [1] + [1] * 20), scores([1] * 9 + [0] + [1] * 20)
    assert compare(mine, others, largest=1.0).p == pytest.approx(22 / 1024)
    assert compare(mine, mine, largest=1.0).p == 1.0


def test_so_many_samples_show_a_difference_of_one_point_four_times_out_of_five() -> None:
    random = np.random.default_rng(4)
    deviation = 10.0  # of a sample's difference, in points
    found = compare(scores(random.normal(0, deviation, 5000)), scores([0.0] * 5000), largest=100.0)
    assert found.needed == pytest.approx((1.96 + 0.8416) ** 2 * deviation**2, rel=0.06)


def test_samples_that_all_agree_say_as_much_as_they_are() -> None:
    few, many = (compare(scores([1] * count), scores([1] * count), largest=1.0) for count in (4, 400))
    assert few.low == pytest.approx(-100 * (1 - 0.025**0.25))
    assert -1.0 < many.low < 0 < many.high < 1.0
    assert math.isnan(many.needed)
    exact = compare(scores([1] * 4), scores([1] * 4), largest=1.0, exact=True)
    assert (exact.low, exact.high) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("values", "others", "mean"), [([1], [0], 100.0), ([math.nan, 1, 0], [1, 1, 0], math.nan)], ids=["one", "no number"]
)
def test_one_sample_and_a_score_that_is_no_number_leave_no_interval(
    values: list[float], others: list[float], mean: float
) -> None:
    found = compare(scores(values), scores(others), largest=1.0)
    assert (found.mean, found.low, found.high) == pytest.approx((mean, math.nan, math.nan), nan_ok=True)


def test_other_samples_are_not_compared() -> None:
    assert compare(scores([1, 0]), scores([1, 0, 1]), largest=1.0) is None
    assert compare({}, {}, largest=1.0) is None


# -- tables -----------------------------------------------------------------------------------------------------------


def made(root: Path) -> list[dict[str, list[Cell | None]]]:
    """The rows of the two tables, differences and critical sparsities, by their methods."""
    found = {table.name: table.rows for table in make_report(str(root)).tables}
    return [{names[-1]: cells for names, cells in found.get(name, [])} for name in ("differences", "critical_sparsity")]


def test_methods_are_compared_with_dense_and_with_griffin_at_their_sparsity(root: Path) -> None:
    rows, _ = made(root)
    assert [*rows] == ["griffin 25%", "griffin 50%", "griffin 75%", "joint 75%"]
    count, points, p, to_griffin, _, length, needed = rows["joint 75%"]
    assert (count.value, points.value, to_griffin.value, length.value) == (100, -10.0, 20.0, 1.0)
    assert points.interval[0] < -10.0 < points.interval[1] < 0
    assert p.value == pytest.approx(2 / 2**10)
    assert needed.value > 100
    assert rows["griffin 75%"][3].number == "itself"
    assert rows["griffin 50%"][5].value == 1.5


@pytest.mark.parametrize("difference", [{"first": 1}, {"task_shots": 0}], ids=["samples", "shots"])
def test_runs_on_other_samples_or_evaluated_differently_are_not_compared(
    difference: dict[str, Any], root: Path
) -> None:
    write(root, "wanda-75", RIGHT, statistic="wanda", sparsity=0.75, **difference)
    assert "wanda 75%" not in made(root)[0]


def test_assisted_dense_decoding_is_not_pruned_at_zero(root: Path) -> None:
    write(root, "lookup", RIGHT, sparsity=0, assistance="prompt_lookup", assistant=None, density=0.6)
    assert not [method for rows in made(root) for method in rows if "lookup" in method]
    assert "lookup" not in leaderboard(str(root))[0]


def test_the_critical_sparsity_is_the_largest_that_excludes_the_loss(root: Path, tmp_path: Path) -> None:
    """One answer of a hundred lost excludes neither a loss of one percent nor of two points; of a thousand, both."""
    _, rows = made(root)
    assert [cell.number for cell in rows["griffin"]] == ["100", "60.0", "25% (0.85)", "25% (0.85)", "75"]
    assert [cell.number for cell in rows["joint"]][2:4] == ["none", "none"]
    many = tmp_path / "many"
    write(many, "dense", RIGHT * 10, sparsity=0)
    write(many, "griffin-50", [0.0, *(RIGHT * 10)[1:]], sparsity=0.5, density=0.7)
    write(many, "griffin-75", [0.0] * 15 + (RIGHT * 10)[15:], sparsity=0.75)
    assert [cell.number for cell in made(many)[1]["griffin"]][2:4] == ["50% (0.70)", "50% (0.70)"]


def test_the_report_has_the_figure_and_begins_with_what_the_runs_show(root: Path, tmp_path: Path) -> None:
    report = make_report(str(root))
    (group,) = [group for group in report.groups if group.title == "Quality against bytes of weights per token"]
    (drawing,) = group.drawings
    assert {*drawing.run_ids} == {"dense", "griffin-25", "griffin-50", "griffin-75", "joint-75"}
    axis = drawing.draw().axes[0]
    assert "dense" in [line.get_label() for line in axis.get_lines()]
    assert {text.get_text() for text in axis.texts} == {"25", "50", "75"}
    sentence = "gsm8k, gemma_7b (exact match, n = 100): within two points of dense stay griffin up to 25%."
    assert report.summary == [sentence]
    assert sentence in write_report(report, tmp_path / "report").read_text(encoding="utf-8")
    assert f"- {sentence}" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8").splitlines()


def test_a_measured_speed_is_told_beside_what_the_runs_show(root: Path) -> None:
    write_run(root, record("latency", "latency", sparsity=0.25, metrics=FAST))
    (sentence,) = make_report(str(root)).summary
    assert sentence.endswith("griffin up to 25%, 1.40 times as fast as dense.")


def test_verified_answers_that_are_denses_leave_nothing_open(tmp_path: Path) -> None:
    write(tmp_path, "dense", RIGHT, sparsity=0)
    write(tmp_path, "verified", RIGHT, sparsity=0.5, verification="exact")
    write_run(tmp_path, record("xsum", sparsity=0))  # of a task that says how it decodes
    (sentence,) = make_report(str(tmp_path)).summary
    assert sentence.endswith("within two points of dense stay griffin verified up to 50%.")


def test_where_nothing_stays_near_dense_the_nearest_is_named(root: Path) -> None:
    for name in ("griffin-25", "griffin-50"):
        shutil.rmtree(root / name)
    (sentence,) = make_report(str(root)).summary
    assert "nearest to dense is joint 75%, -10.0 points [" in sentence


def test_samples_are_needed(root: Path) -> None:
    (root / "dense" / "samples.jsonl").unlink()
    assert made(root) == [{}, {}]


# -- the leaderboard --------------------------------------------------------------------------------------------------


def test_the_leaderboard_has_every_run_of_a_task_in_one_table(root: Path) -> None:
    write(root, "verified", RIGHT, sparsity=0.8, verification="exact", density=0.4, batch_size=8)
    text, ranked = leaderboard(str(root))
    rows = [line.split(" | ")[:2] for line in text.splitlines() if re.match(r"\| \d", line)]
    verified = "griffin verified 80% [batch_size=8, of dense 1]"
    methods = ("griffin 25%", verified, "griffin 50%", "joint 75%", "griffin 75%")
    assert rows == [[f"| {rank}", method] for rank, method in enumerate(methods, start=1)]
    assert ranked == len(rows)


def test_the_leaderboard_is_a_command(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "docs" / "leaderboard.md"
    ended = process([sys.executable, "-m", "analysis.leaderboard", f"runs={root}", f"out={out}"], tmp_path)
    assert (ended.code, ended.out) == (0, f"Leaderboard: {out} (4 runs ranked)\n")
    assert {"## gsm8k, gemma_7b", "torch 2.13.0; cpu."} <= {*out.read_text(encoding="utf-8").splitlines()}
    wrong = process([sys.executable, "-m", "analysis.leaderboard", f"runs={root}", "into=x"], tmp_path)
    assert (wrong.code, wrong.err) == (1, "error: into: no such key; expected runs, out\n")


def test_runs_without_dense_cannot_be_ranked(tmp_path: Path) -> None:
    write(tmp_path, "griffin-50", RIGHT, sparsity=0.5, density=0.7)
    with pytest.raises(UserError, match="expected pruned runs of a task, and a dense run on the same samples"):
        leaderboard(str(tmp_path))
