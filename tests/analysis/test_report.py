"""The report: its files, its numbers, what it says to a user's mistakes, and its page in a real browser."""

import csv
import html
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from calling import process
from made import COMMAND, FAST, change, every_kind, few, record, write_run
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from analysis import callback
from analysis import report as report_module
from analysis.contents import make_report
from analysis.drawing import MOST_SHOWN, Group, Styles, drawing, numbered
from analysis.output import write_report
from analysis.report import main
from pipelines.errors import UserError


def cells_of(out: Path) -> list[dict[str, str]]:
    return [
        row
        for path in (out / "tables").glob("*.csv")
        if path.stem not in ("critical_sparsity", "differences")  # of two runs each; tests/analysis/test_paired.py
        for row in csv.DictReader(path.open(encoding="utf-8", newline=""))
    ]


def written(runs: Path, out: Path) -> str:
    return write_report(make_report(str(runs)), out).read_text(encoding="utf-8")


def test_a_report_is_a_page_texts_tables_and_figures(report: Path) -> None:
    names = {path.name for path in report.iterdir()}
    assert names == {".written", "index.html", "report.md", "runs.csv", "tables", "figures"}
    suffixes = {"tables": (".md", ".tex", ".csv"), "figures": (".png", ".pdf", ".svg")}
    found = {folder: Counter(path.suffix for path in (report / folder).iterdir()) for folder in suffixes}
    assert found == {"tables": dict.fromkeys(suffixes["tables"], 10), "figures": {".png": 11, ".pdf": 11, ".svg": 22}}


def test_every_number_of_every_table_is_a_number_of_its_run(report: Path) -> None:
    page = re.split(r"<h\d[^>]*>Critical sparsity", (report / "index.html").read_text(encoding="utf-8"))[0]
    records = {one["run_id"]: one for one in every_kind()}
    measured = [row for row in cells_of(report) if row["status"] == "measured"]
    assert len(measured) >= 30
    for row in measured:
        numbers = {repr(float(value)) for value in records[row["run_id"]]["metrics"].values()}
        assert row["value"] in numbers
        assert row["stderr"] in {"", *numbers}
    for run_id, shown in re.findall(r'<a href="#([^"]+)">(?:<b>)?(-?[\d.]+)(?:</b>)?</a>', page):
        digits = len(shown.partition(".")[2])
        assert shown in {f"{value:.{digits}f}" for value in records[run_id]["metrics"].values()}


def test_the_page_names_every_run_with_its_method_command_and_versions(report: Path) -> None:
    page = (report / "index.html").read_text(encoding="utf-8")
    for one in every_kind():
        _, _, run = page.partition(f'id="{one["run_id"]}"')
        run, _, _ = run.partition("</li>")
        for words in (one["method"]["label"], "torch 2.13.0", COMMAND.replace("'", "&#39;")):
            assert words in run


def test_the_page_fetches_nothing_and_runs_nothing(report: Path) -> None:
    page = (report / "index.html").read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|srcset|href|action|data)="([^"]*)"', page)
    assert sources
    assert [source[:60] for source in sources if not source.startswith(("data:", "#"))] == []
    assert "<script" not in page
    assert "url(" not in page.split("<body>")[0]
    assert page.count("data:image/svg+xml") == 2 * 11


def test_a_wrong_and_a_missing_record_are_told_and_shown_nowhere(runs: Path, tmp_path: Path) -> None:
    wrong, missing = runs / "xsum-griffin-50", runs / "xsum-magnitude-50"
    (wrong / "samples.jsonl").unlink()
    (missing / "record.json").unlink()
    page = written(runs, tmp_path / "out")
    for folder, state in ((wrong, "contradicted"), (missing, "unfinished")):
        assert re.search(rf"<code>{folder.name}</code> {state}", page)
        assert f'id="{folder.name}"' not in page
        assert f"`{folder.name}`: {state}" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert {row["run_id"] for row in cells_of(tmp_path / "out")} & {wrong.name, missing.name} == set()


def test_a_second_report_in_the_same_folder_is_the_same_or_replaces_the_first(runs: Path) -> None:
    out = runs / "report"  # it may lie among the runs
    (out / "figures").mkdir(parents=True)
    (out / "figures" / "own.png").touch()
    first = written(runs, out)
    assert [*out.glob("tables/latency*")]
    assert written(runs, out) == first
    (runs / "latency-griffin-50" / "record.json").unlink()
    page = written(runs, out)
    assert [*out.glob("tables/latency*"), *out.glob("figures/latency*")] == []
    assert (out / "figures" / "own.png").exists(), "a file of the user's"
    assert page.count("too few runs; this makes more") == 6
    assert "python -m pipelines.run task=flocking" in page


def test_versions_that_differ_and_speeds_beyond_their_limits_are_told(runs: Path) -> None:
    assert make_report(str(runs)).notes == []
    change(runs / "xsum-dense", environment__torch="1.0")
    write_run(runs, record("faster", "latency", 0.25, metrics=FAST | {"decode_fraction_of_limit": 1.5}))
    versions, speed = make_report(str(runs)).notes
    assert versions == "torch differs: 2.13.0 (4 runs), 1.0 (1 runs)"
    assert speed.startswith("faster: decoding is 1.50 times as fast as its limit")


def test_names_that_look_alike_as_files_are_told_apart_and_of_many_figures_the_first_are_drawn() -> None:
    drawings = [drawing(("a", name), name, [], Figure) for name in ("x y", "x_y", "x/y", "x" * 300)]
    names = [one.name for one in numbered(Group("title", drawings, "")).drawings]
    assert names[:3] == ["a_x_y", "a_x_y_2", "a_x_y_3"]
    assert len(names[3]) <= 120
    group = numbered(Group("title", [drawings[0]] * (MOST_SHOWN + 3), "", "Bars."))
    assert len({one.name for one in group.drawings}) == len(group.drawings) == MOST_SHOWN
    assert group.note.startswith("Bars. 3 more are not drawn")


def test_any_name_of_a_model_is_shown_as_it_is(tmp_path: Path) -> None:
    names = ["a$b$c", "<b>&amp;", "{{ 1 + 1 }}", "_x"]
    for number, name in enumerate(names):
        write_run(tmp_path / "runs", record(str(number), model_name=name))
    page = written(tmp_path / "runs", tmp_path / "out")
    assert [name for name in names if html.escape(name) not in page] == []


def test_one_method_has_one_colour_whatever_else_there_is() -> None:
    families = ("griffin", "magnitude", "wanda", "dense", "new", "zzz")
    some, more = Styles(["griffin", "dense", "new"]), Styles(families)
    for family in ("griffin", "dense"):
        assert some.colour(family) == more.colour(family)
        assert some.marker(family) == more.marker(family)
    assert len({more.colour(family) for family in families}) == len(families)
    many = [f"method{number}" for number in range(30)]
    looks = Styles(many)
    assert len({(looks.colour(family), looks.marker(family)) for family in many}) == len(many)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["runs=/nowhere", "out=x"], "runs=/nowhere: no such folder"),
        (["runs=.", "out=x"], "no run folder in it"),
        (["runs=/dev/null", "out=x"], "runs=/dev/null: not a folder"),
        (["out=x"], "runs=: expected a folder"),
        (["runs=x"], "out=: expected a folder"),
        (["runs=x", "out=x", "rusn=y"], r"rusn: no such key \(did you mean runs\?\)"),
        (["runs=x", "out=x", "report"], "report: expected KEY=VALUE"),
        (["runs=x", "out=x", "log=mlflow"], "log=mlflow: expected none, wandb"),
        (["runs=x", "out=x", "log=wandb:me/a#b"], "log=wandb:me/a#b: expected none, wandb"),
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


def test_a_folder_that_cannot_be_written_is_one_line(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (runs / "report").touch()
    with pytest.raises(UserError, match=r"out=.*: cannot write"):
        write_report(make_report(str(runs)), runs / "report")
    closing: list[str] = []
    monkeypatch.setattr(callback, "CLOSING", closing)
    callback.WriteReport().on_run_end(OmegaConf.create({"output_dir": str(runs)}))
    (line,) = closing
    assert line.startswith(f"warning: no report: out={runs}/report: cannot write"), "at the end of a run"


def test_help_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(f"  {key}" in text for key in report_module._KEYS)


def test_the_analysis_imports_light_parts_of_the_pipeline_and_never_torch(tmp_path: Path) -> None:
    paths = [*Path(report_module.__file__).parent.glob("[a-z]*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    assert not re.search(r"^\s*(from|import) (griffin|torch|transformers|pipelines import)\b", code, re.MULTILINE)
    # Also where a function imports a module: all that is named anywhere in analysis/ is imported here.
    modules = {*re.findall(r"from (pipelines\.[\w.]+) import", code), *(f"analysis.{path.stem}" for path in paths)}
    assert {"pipelines.tracking", "analysis.runs"} <= modules
    script = (
        "import sys, analysis.report; print('wandb' in sys.modules); "  # which takes seconds
        f"import {', '.join(modules)}; print({{'torch', 'transformers', 'griffin'}} & {{*sys.modules}})"
    )
    assert process([sys.executable, "-c", script], tmp_path).out == "False\nset()\n"


def test_a_report_can_be_of_some_runs_only(tmp_path: Path) -> None:
    for one in few():
        one["config"]["tags"] = ["paper", "draft"] if "griffin" in one["run_id"] else []
        write_run(tmp_path / "runs", one)
    source = str(tmp_path / "runs")

    def found(**only: str) -> list[str]:
        return sorted(record["run_id"] for record in make_report(source, only).runs.records)

    assert found(tags="paper") == ["latency-griffin-50", "xsum-griffin-50"]
    assert found(tags="paper", task="xsum") == ["xsum-griffin-50"]
    assert found(method="griffin 50%,dense", model="gemma_7b", task="xsum, piqa") == ["xsum-dense", "xsum-griffin-50"]
    assert found(method="magnitude") == ["xsum-magnitude-50"]
    assert len(found(tags="")) == 4
    with pytest.raises(UserError, match="method=griffin 30%: no such run among 4; there are method: dense, griffin"):
        found(method="griffin 30%")


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian's package)")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_opens_offline_and_shows_its_figures(width: int, dark: bool, browser: Browser, report: Path) -> None:
    page = report / "index.html"
    seen = browser.open(page, width, dark)
    assert seen.messages == []
    assert [address for address in seen.requests if not address.startswith("data:")] == [page.resolve().as_uri()]
    assert seen.page_width == width  # wide tables scroll in their own frames
    assert len(seen.images) == 11
    for image in seen.images:
        assert image["shown"]
        assert image["natural"] > 0
        assert 0 <= image["left"] < image["right"] <= width
        assert image["width"] >= 300  # the figures' own text is readable from there on
        assert image["height"] > 100


@needs_browser
def test_dark_is_dark_with_figures_of_its_own(browser: Browser, report: Path) -> None:
    light, dark = (browser.open(report / "index.html", 1280, dark) for dark in (False, True))
    brightness = [sum(map(int, seen.colour.removeprefix("rgb(").rstrip(")").split(","))) for seen in (light, dark)]
    assert brightness[0] > 600 > 150 > brightness[1]
    assert [image["source"] for image in light.images] != [image["source"] for image in dark.images]


@needs_browser
def test_the_browser_would_tell(browser: Browser, tmp_path: Path) -> None:
    # The tests above pass where nothing is seen: here is what they look for.
    page = tmp_path / "page.html"
    page.write_text(
        '<p style="width:2000px">wide</p><img src="http://127.0.0.1:9/x.png">'
        '<script>console.error("oh"); none()</script>'
    )
    seen = browser.open(page, 1280)
    assert any("oh" in message for message in seen.messages)
    assert any("none" in message for message in seen.messages)
    assert "http://127.0.0.1:9/x.png" in seen.requests
    assert seen.page_width > 1280
    assert [image["natural"] for image in seen.images] == [0]
