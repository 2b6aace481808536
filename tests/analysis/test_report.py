"""The report of real runs: its files, its numbers, and what it says to a user's mistakes."""

from __future__ import annotations

import csv
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from lab import Lab
from matplotlib.figure import Figure

from analysis import report as report_module
from analysis.drawing import Drawing, Group, Looks, file_name, named_apart
from analysis.report import main, make_report, write_report
from pipelines.errors import UserError


def records_in(runs: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text(encoding="utf-8")) for path in runs.glob("*/record.json")]
    return {record["run_id"]: record for record in found}


def cells_of(out: Path) -> list[dict[str, str]]:
    return [
        row
        for path in (out / "tables").glob("*.csv")
        for row in csv.DictReader(path.open(encoding="utf-8", newline=""))
    ]


def written(runs: Path, out: Path) -> str:
    return write_report(make_report(str(runs)), out).read_text(encoding="utf-8")


def test_the_command_writes_everything_and_says_where(report: Path, lab: Lab) -> None:
    assert f"Report: {report}/index.html (10 runs, 7 tables, 19 figures)" in (lab.root / "said").read_text()
    names = {path.name for path in report.iterdir()}
    assert names == {".written", "index.html", "report.md", "runs.csv", "tables", "figures"}
    for folder, suffixes in (("tables", {".md", ".tex", ".csv"}), ("figures", {".png", ".pdf"})):
        found: dict[str, set[str]] = {}
        for path in (report / folder).iterdir():
            found.setdefault(path.stem, set()).add(path.suffix)
        assert found
        assert all(have == suffixes for have in found.values()), found


def test_every_number_of_every_table_is_a_number_of_its_run(report: Path, lab: Lab) -> None:
    page = (report / "index.html").read_text(encoding="utf-8")
    records = records_in(lab.out)
    measured = [row for row in cells_of(report) if row["status"] == "measured"]
    assert len(measured) >= 50
    for row in measured:
        numbers = {repr(float(value)) for value in records[row["run_id"]]["metrics"].values()}
        assert row["value"] in numbers
        assert row["stderr"] in {"", *numbers}
    for run_id, shown in re.findall(r'<a href="#([^"]+)">(?:<b>)?(-?[\d.]+)(?:</b>)?</a>', page):
        digits = len(shown.partition(".")[2])
        assert shown in {f"{value:.{digits}f}" for value in records[run_id]["metrics"].values()}


def test_the_page_names_every_run_with_its_command_and_versions(report: Path, lab: Lab) -> None:
    page = (report / "index.html").read_text(encoding="utf-8")
    for run_id, record in records_in(lab.out).items():
        assert f'id="{run_id}"' in page
        assert record["environment"]["torch"] in page
        command = record["environment"]["command"]
        assert command.startswith("python -m pipelines.run ")
        assert command.replace("'", "&#39;") in page


def test_the_page_fetches_nothing_and_runs_nothing(report: Path, lab: Lab) -> None:
    page = (report / "index.html").read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|srcset|href|action|data)="([^"]*)"', page)
    assert sources
    assert [source[:60] for source in sources if not source.startswith(("data:", "#"))] == []
    assert "<script" not in page
    assert "url(" not in page.split("<body>")[0]
    assert page.count("data:image/svg+xml") == 2 * 19


def test_a_wrong_and_a_missing_record_are_told_and_shown_nowhere(few_runs: Path, tmp_path: Path) -> None:
    (wrong,) = few_runs.glob("briefs-random_tiny-griffin-50-*")
    (missing,) = few_runs.glob("briefs-random_tiny-magnitude-50-*")
    record = json.loads((wrong / "record.json").read_text(encoding="utf-8"))
    record["metrics"]["rouge1"] += 40.0
    (wrong / "record.json").write_text(json.dumps(record), encoding="utf-8")
    (missing / "record.json").unlink()
    page = written(few_runs, tmp_path)
    for folder, state in ((wrong, "contradicted"), (missing, "unfinished")):
        assert re.search(rf"<code>{folder.name}</code> {state}", page)
        assert f'id="{folder.name}"' not in page
        assert f"`{folder.name}`: {state}" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert {row["run_id"] for row in cells_of(tmp_path)} & {wrong.name, missing.name} == set()


def test_the_same_runs_make_the_same_page(few_runs: Path, tmp_path: Path) -> None:
    assert written(few_runs, tmp_path / "one") == written(few_runs, tmp_path / "other")


def test_nothing_of_an_earlier_report_stays_but_other_files_do(few_runs: Path, tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "own.png").touch()
    written(few_runs, tmp_path)
    for folder in few_runs.glob("latency-*"):
        (folder / "record.json").unlink()
    written(few_runs, tmp_path)
    assert [*tmp_path.glob("tables/latency*"), *tmp_path.glob("figures/latency*")] == []
    assert (tmp_path / "figures" / "own.png").exists()


def test_a_figure_without_data_says_what_would_make_it(few_runs: Path, tmp_path: Path) -> None:
    for folder in few_runs.glob("latency-*"):
        (folder / "record.json").unlink()
    page = written(few_runs, tmp_path)
    assert page.count("no data; this makes it") == 4
    assert "python -m pipelines.run task=flocking" in page


def test_a_report_may_lie_among_the_runs(few_runs: Path) -> None:
    first = written(few_runs, few_runs / "report")
    assert written(few_runs, few_runs / "report") == first


def test_different_versions_are_told(runs: Path) -> None:
    (folder,) = runs.glob("briefs-random_tiny-dense-*")
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    record["environment"]["torch"] = "1.0"
    (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")
    assert [note for note in make_report(str(runs)).notes if note.startswith("torch differs:")]


def test_a_speed_beyond_its_limit_is_told(few_runs: Path) -> None:
    (path,) = few_runs.glob("latency-*/record.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    for value, told in ((0.9, 0), (1.5, 1)):
        record["metrics"]["decode_fraction_of_limit"] = value
        path.write_text(json.dumps(record), encoding="utf-8")
        notes = make_report(str(few_runs)).notes
        assert len([note for note in notes if "1.50 times as fast as its limit" in note]) == told


def test_names_that_look_alike_as_files_are_told_apart() -> None:
    drawings = [Drawing(file_name("a", name), name, "", (), Figure) for name in ("x y", "x_y", "x/y", "x" * 300)]
    (group,) = named_apart([Group("title", drawings, "")])
    names = [drawing.name for drawing in group.drawings]
    assert names[:3] == ["a_x_y", "a_x_y_2", "a_x_y_3"]
    assert len(names[3]) <= 120


@pytest.mark.parametrize("name", ["a$b$c", "<b>&amp;", "{{ 1 + 1 }}", "_x"])
def test_any_name_of_a_model_is_shown_as_it_is(name: str, few_runs: Path, tmp_path: Path) -> None:
    for path in few_runs.glob("*/record.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        record["config"]["model"]["name"] = name
        path.write_text(json.dumps(record), encoding="utf-8")
    page = written(few_runs, tmp_path)
    assert html.escape(name) in page


def test_one_method_has_one_colour_whatever_else_there_is() -> None:
    families = ("griffin", "magnitude", "wanda", "dense", "new", "zzz")
    some, more = Looks(["griffin", "dense", "new"]), Looks(families)
    for family in ("griffin", "dense"):
        assert some.colour(family) == more.colour(family)
        assert some.marker(family) == more.marker(family)
    assert len({more.colour(family) for family in families}) == len(families)
    many = [f"method{number}" for number in range(30)]
    looks = Looks(many)
    assert len({(looks.colour(family), looks.marker(family)) for family in many}) == len(many)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["runs=/nowhere", "out=x"], "runs=/nowhere: no such folder"),
        (["runs=.", "out=x"], "no run folder in it"),
        (["out=x"], "runs=: expected a folder"),
        (["runs=x"], "out=: expected a folder"),
        (["runs=x", "out=x", "rusn=y"], r"rusn: no such key \(did you mean runs\?\)"),
        (["runs=x", "out=x", "report"], "report: expected KEY=VALUE"),
        (["runs=x", "out=x", "log=mlflow"], "log=mlflow: expected none, wandb"),
        (["runs=wandb:a/b/c", "out=x"], "expected wandb:entity/project"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        main(arguments)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_on_the_command_line_is_one_line_and_an_exit_code(lab: Lab) -> None:
    ended = lab.python("-m", "analysis.report", "runs=/nowhere", "out=x")
    assert ended.returncode == 1
    assert ended.stderr == "error: runs=/nowhere: no such folder\n"


def test_a_folder_that_cannot_be_written_is_one_line(few_runs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"out=.*: cannot write"):
        write_report(make_report(str(few_runs)), tmp_path / "file" / "report")


def test_help_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(f"  {key}" in text for key in report_module._KEYS)


def test_a_report_needs_no_torch(lab: Lab) -> None:
    script = "import sys, analysis.report; print({'torch', 'transformers', 'wandb'} & {*sys.modules})"
    assert lab.python("-c", script).stdout == "set()\n"
