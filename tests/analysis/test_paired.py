"""Methods compared sample by sample: differences, intervals, critical sparsities, and the leaderboard."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lab import python
from made import record, write_run

from analysis.contents import make_report
from analysis.critical_sparsity import critical_sparsities
from analysis.frame import frame
from analysis.leaderboard import leaderboard
from analysis.output import write_report
from analysis.paired import compare, differences, pairs
from analysis.samples import read_scores
from analysis.sources import read_runs
from analysis.tables import Cell, Table
from pipelines.errors import UserError
from pipelines.records import digests


def scores(values: Sequence[float]) -> dict[int, float]:
    return dict(enumerate(map(float, values)))


def write(root: Path, run_id: str, values: Sequence[float], tokens: int = 10, **more: Any) -> None:
    """A finished run of question answering whose samples have these scores, right or wrong."""
    density = more.pop("density", None)
    first = more.pop("first", 0)
    count, mean = len(values), sum(values) / len(values)
    spread = float(np.std(values, ddof=1)) / math.sqrt(count)
    metrics = {"exact_match": mean, "exact_match_stderr": spread, "samples": count}
    metrics |= {} if density is None else {"effective_density": density}
    settings = {"task_name": "gsm8k", "task_decoding": None, "task_shots": 5} | more
    one = record(run_id, "generation", metrics=metrics, **settings)
    folder = root / run_id
    folder.mkdir(parents=True)
    samples = [
        {"index": first + index, "generated_tokens": tokens, "metrics": {"exact_match": value}}
        for index, value in enumerate(values)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    one["digests"] = digests(metrics, folder / "samples.jsonl")
    (folder / "record.json").write_text(json.dumps(one), encoding="utf-8")


RIGHT = [1.0] * 60 + [0.0] * 40


def write_all(root: Path) -> Path:
    """Dense, GRIFFIN at three sparsities that loses nothing, one point and thirty, and a better method."""
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
    assert rouge.mean == 5.0
    assert rouge.p is None, "ROUGE is neither right nor wrong"


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


def test_the_interval_covers_the_true_difference_as_often_as_it_says() -> None:
    random, inside = np.random.default_rng(3), 0
    for _ in range(200):
        others = random.random(80) < 0.6
        mine = np.where(random.random(80) < 0.2, random.random(80) < 0.5, others)  # true difference: -2 points
        found = compare(scores(mine), scores(others), largest=1.0)
        inside += found.low <= -2.0 <= found.high
    assert 0.90 < inside / 200 <= 0.99


def test_mcnemar_counts_where_the_two_differ() -> None:
    """Nine answers lost and one won: 2 * P(at most one of ten) = 22 / 1024."""
    mine, others = scores([0] * 9 + [1] + [1] * 20), scores([1] * 9 + [0] + [1] * 20)
    assert compare(mine, others, largest=1.0).p == pytest.approx(22 / 1024)
    assert compare(mine, mine, largest=1.0).p == 1.0


def test_samples_needed_for_a_point_are_those_that_show_it() -> None:
    """Of so many samples, a true difference of one point is significant four times out of five."""
    random = np.random.default_rng(4)
    deviation = 10.0  # of a sample's difference, in points
    found = compare(scores(random.normal(0, deviation, 5000)), scores([0.0] * 5000), largest=100.0)
    count = round(found.needed)
    assert count == pytest.approx((1.96 + 0.8416) ** 2 * deviation**2, rel=0.06)
    means = random.normal(1.0, deviation, (2000, count)).mean(axis=1)
    assert np.mean(means > 1.96 * deviation / math.sqrt(count)) == pytest.approx(0.8, abs=0.04)


def test_samples_that_all_agree_say_as_much_as_they_are() -> None:
    few, many = (compare(scores([1] * count), scores([1] * count), largest=1.0) for count in (4, 400))
    assert few.low == pytest.approx(-100 * (1 - 0.025**0.25))
    assert -1.0 < many.low < 0 < many.high < 1.0
    assert math.isnan(many.needed)
    exact = compare(scores([1] * 4), scores([1] * 4), largest=1.0, exact=True)
    assert (exact.low, exact.high) == (0.0, 0.0)


def test_one_sample_has_no_interval() -> None:
    found = compare(scores([1]), scores([0]), largest=1.0)
    assert found.mean == 100.0
    assert math.isnan(found.low)


def test_other_samples_are_not_compared() -> None:
    assert compare(scores([1, 0]), scores([1, 0, 1]), largest=1.0) is None
    assert compare({}, {}, largest=1.0) is None


# -- tables -----------------------------------------------------------------------------------------------------------


def made(root: Path) -> tuple[Table, Table]:
    runs = read_runs(str(root))
    table = frame(runs.records)
    scores = read_scores(runs, table)
    to_dense, to_griffin = (pairs(scores, table, against) for against in ("dense", "griffin"))
    return differences(to_dense, to_griffin), critical_sparsities(to_dense)


def row(table: Table, method: str) -> list[Cell | None]:
    (cells,) = [cells for names, cells in table.rows if names[-1] == method]
    return cells


def test_methods_are_compared_with_dense_and_with_griffin_at_their_sparsity(tmp_path: Path) -> None:
    table, _ = made(write_all(tmp_path))
    assert [names[-1] for names, _ in table.rows] == ["griffin 25%", "griffin 50%", "griffin 75%", "joint 75%"]
    count, points, p, to_griffin, _, length, needed = row(table, "joint 75%")
    assert (count.value, points.value, to_griffin.value, length.value) == (100, -10.0, 20.0, 1.0)
    assert points.interval[0] < -10.0 < points.interval[1] < 0
    assert p.value == pytest.approx(2 / 2**10)
    assert needed.value > 100
    assert row(table, "griffin 75%")[3].number == "itself"
    assert row(table, "griffin 50%")[5].value == 1.5


@pytest.mark.parametrize("difference", [{"first": 1}, {"task_shots": 0}], ids=["samples", "shots"])
def test_runs_on_other_samples_or_evaluated_differently_are_not_compared(
    difference: dict[str, Any], tmp_path: Path
) -> None:
    write_all(tmp_path)
    write(tmp_path, "wanda-75", RIGHT, statistic="wanda", sparsity=0.75, **difference)
    table, _ = made(tmp_path)
    assert "wanda 75%" not in [names[-1] for names, _ in table.rows]


def test_assisted_dense_decoding_is_not_pruned_at_zero(tmp_path: Path) -> None:
    write_all(tmp_path)
    write(tmp_path, "lookup", RIGHT, sparsity=0, assistance="prompt_lookup", assistant=None, density=0.6)
    for table in made(tmp_path):
        assert not [names for names, _ in table.rows if "lookup" in names[-1]]
    assert "lookup" not in leaderboard(str(tmp_path))[0]


def test_a_score_that_is_no_number_leaves_no_interval() -> None:
    difference = compare(scores([math.nan, 1, 0]), scores([1, 1, 0]), largest=1.0)
    assert math.isnan(difference.mean)
    assert math.isnan(difference.low)


def test_the_critical_sparsity_is_the_largest_that_excludes_the_loss(tmp_path: Path) -> None:
    """One answer of a hundred lost excludes neither a loss of one percent nor of two points; of a thousand, both."""
    root = write_all(tmp_path)
    _, table = made(root)
    assert [cell.number for cell in row(table, "griffin")] == ["100", "60.0", "25% (0.85)", "25% (0.85)", "75"]
    assert [cell.number for cell in row(table, "joint")][2:4] == ["none", "none"]
    many = tmp_path / "many"
    write(many, "dense", RIGHT * 10, sparsity=0)
    write(many, "griffin-50", [0.0, *(RIGHT * 10)[1:]], sparsity=0.5, density=0.7)
    write(many, "griffin-75", [0.0] * 15 + (RIGHT * 10)[15:], sparsity=0.75)
    _, table = made(many)
    assert [cell.number for cell in row(table, "griffin")][2:4] == ["50% (0.70)", "50% (0.70)"]


def test_the_report_has_both_tables_and_the_figure(tmp_path: Path) -> None:
    report = make_report(str(write_all(tmp_path)))
    assert {"differences", "critical_sparsity"} <= {table.name for table in report.tables}
    (group,) = [group for group in report.groups if group.title == "Quality against bytes of weights per token"]
    (drawing,) = group.drawings
    assert set(drawing.run_ids) == {"dense", "griffin-25", "griffin-50", "griffin-75", "joint-75"}
    axis = drawing.draw().axes[0]
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert "dense" in lines
    texts = {text.get_text() for text in axis.texts}
    assert texts == {"25", "50", "75"}


def test_the_report_begins_with_what_the_runs_show(tmp_path: Path) -> None:
    root = write_all(tmp_path / "runs")
    report = make_report(str(root))
    sentence = "gsm8k, gemma_7b (exact match, n = 100): within two points of dense stay griffin up to 25%."
    assert report.summary == [sentence]
    write_report(report, tmp_path / "report")
    assert sentence in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert f"- {sentence}" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8").splitlines()


def test_verified_answers_that_are_denses_leave_nothing_open(tmp_path: Path) -> None:
    write(tmp_path, "dense", RIGHT, sparsity=0)
    write(tmp_path, "verified", RIGHT, sparsity=0.5, verification="exact")
    write_run(tmp_path, record("xsum", sparsity=0))  # of a task that says how it decodes
    (sentence,) = make_report(str(tmp_path)).summary
    assert sentence.endswith("within two points of dense stay griffin verified up to 50%.")


def test_where_nothing_stays_near_dense_the_nearest_is_named(tmp_path: Path) -> None:
    write(tmp_path, "dense", RIGHT, sparsity=0)
    write(tmp_path, "griffin-75", [0.0] * 30 + RIGHT[30:], sparsity=0.75)
    write(tmp_path, "joint-75", [0.0] * 10 + RIGHT[10:], sparsity=0.75, statistic="joint")
    (sentence,) = make_report(str(tmp_path)).summary
    assert "nearest to dense is joint 75%, -10.0 points [" in sentence


def test_a_measured_speed_is_told_beside_it(tmp_path: Path) -> None:
    write_all(tmp_path)
    fast = {"decode_speedup": 1.4, "decode_limit": 1.5, "decode_fraction_of_limit": 0.93, "samples": 4}
    write_run(tmp_path, record("latency", "latency", sparsity=0.25, metrics=fast))
    (sentence,) = make_report(str(tmp_path)).summary
    assert sentence.endswith("griffin up to 25%, 1.40 times as fast as dense.")


def test_samples_are_needed(tmp_path: Path) -> None:
    root = write_all(tmp_path)
    (root / "dense" / "samples.jsonl").unlink()
    table, critical = made(root)
    assert (table.rows, critical.rows) == ([], [])


# -- the leaderboard --------------------------------------------------------------------------------------------------


def test_the_leaderboard_has_every_run_of_a_task_in_one_table(tmp_path: Path) -> None:
    root = write_all(tmp_path)
    write(root, "verified", RIGHT, sparsity=0.8, verification="exact", density=0.4, batch_size=8)
    text, ranked = leaderboard(str(root))
    rows = [line.split(" | ")[:2] for line in text.splitlines() if line[:3] in {f"| {rank}" for rank in range(1, 9)}]
    assert ranked == 5
    assert rows == [
        [f"| {rank}", method]
        for rank, method in enumerate(
            [
                "griffin 25%",
                "griffin verified 80% [batch_size=8, of dense 1]",
                *("griffin 50%", "joint 75%", "griffin 75%"),
            ],
            start=1,
        )
    ]


def test_the_leaderboard_is_a_command(tmp_path: Path) -> None:
    root, out = write_all(tmp_path / "runs"), tmp_path / "docs" / "leaderboard.md"
    ended = python(tmp_path, "-m", "analysis.leaderboard", f"runs={root}", f"out={out}")
    assert ended.returncode == 0, ended.stderr
    assert f"Leaderboard: {out} (4 runs ranked)" in ended.stdout
    assert "## gsm8k, gemma_7b" in out.read_text(encoding="utf-8")
    assert "torch 2.13.0" in out.read_text(encoding="utf-8")
    wrong = python(tmp_path, "-m", "analysis.leaderboard", f"runs={root}", "into=x")
    assert wrong.returncode == 1
    assert wrong.stderr.splitlines() == ["error: into: no such key; expected runs, out"]


def test_runs_without_dense_cannot_be_ranked(tmp_path: Path) -> None:
    write(tmp_path, "griffin-50", RIGHT, sparsity=0.5, density=0.7)
    with pytest.raises(UserError, match="expected pruned runs of a task, and a dense run on the same samples"):
        leaderboard(str(tmp_path))
