"""Tables: every number is a record's, what is better is bold, what is not there is missing; their LaTeX compiles."""

import csv
import io
import math
import re
import shutil
from pathlib import Path

import pytest
from calling import process
from made import Record, record, score, scores

from analysis.frame import frame
from analysis.output import comma_separated, latex, markdown
from analysis.tables import DASH, Cell, Table, tables


def made(*records: Record) -> Table:
    (table,) = tables(frame(records))
    return table


def cell(table: Table, method: str, column: int = 0, task: str = "xsum") -> Cell:
    (found,) = [cells for names, cells in table.rows if names[:2] == (f"gemma_7b, {task}", method)]
    return found[column]


def numbers(cells: list[Cell | None]) -> list[str | None]:
    return [cell and cell.number for cell in cells]


def lines(table: Table) -> list[dict[str, str]]:
    """The lines of its CSV."""
    return [*csv.DictReader(io.StringIO(comma_separated(table)))]


def test_numbers_and_errors_are_the_records_to_the_printed_digit() -> None:
    table = made(record("a", metrics=score(12.34567, 0.98765)))
    found = cell(table, "griffin 50%")
    assert (found.number, found.error, found.run_id) == ("12.35", "0.99", "a")
    line, count = lines(table)
    assert (count["column"], float(count["value"])) == ("n", 4.0)
    assert (float(line["value"]), float(line["stderr"])) == (12.34567, 0.98765)
    assert "±" not in markdown(made(record("a", metrics=score(12.0, 0.0))))


def test_perplexity_has_an_interval_above_zero() -> None:
    table = made(record("a", "perplexity", metrics=score(10.0, 12.0, "perplexity")))
    assert "| 10.00 [3.01, 33.20] |" in markdown(table)  # 10 / e^1.2 and 10 e^1.2
    assert float(lines(table)[0]["stderr"]) == 12.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_a_result(value: float) -> None:
    table = made(
        record("a", "perplexity", sparsity=0, metrics=score(10.0, name="perplexity")),
        record("b", "perplexity", metrics=score(value, value, "perplexity")),
        record("c", "perplexity", statistic="wanda", metrics=score(12.0, name="perplexity")),
    )
    found = cell(table, "griffin 50%", task="perplexity")
    assert (found.number, found.percent) == (str(value), "")
    assert cell(table, "wanda 50%", task="perplexity").best
    assert f"| {value} " in markdown(table)
    assert str(value) in comma_separated(table)
    assert str(value) in latex(table)


def test_changes_are_relative_to_dense_of_the_same_model_and_task() -> None:
    table = made(
        record("a", sparsity=0, metrics=score(20.0)),
        record("b", metrics=score(15.0)),
        record("c", metrics=score(15.0), limit=10),  # dense was not run with this limit
    )
    assert cell(table, "griffin 50%", task="xsum [limit=10]").percent == ""
    assert cell(table, "griffin 50%", task="xsum [limit=null]").percent == "\N{MINUS SIGN}25.0%"
    assert cell(table, "dense", task="xsum [limit=null]").percent == ""


def test_dense_is_the_one_that_rounds_alike_and_a_difference_is_told() -> None:
    table = made(
        *(record(f"dense-{size}", sparsity=0, batch_size=size, metrics=score(10.0 * size)) for size in (1, 2)),
        record("alike", batch_size=2, metrics=score(10.0)),
        record("apart", batch_size=4, sparsity=0.25, metrics=score(10.0)),
    )
    assert cell(table, "griffin 50%").percent == "\N{MINUS SIGN}50.0%"
    assert cell(table, "griffin 25% [batch_size=4, of dense 1]").percent == "+0.0%"


@pytest.mark.parametrize(
    ("kind", "name", "dense", "value", "percent"),
    [("perplexity", "perplexity", 10.0, 31560.0, "3,156x dense"), ("fidelity", "kl", 0.0, 0.5, "")],
)
def test_far_from_dense_is_a_factor_and_dense_zero_has_no_change(
    kind: str, name: str, dense: float, value: float, percent: str
) -> None:
    table = made(
        record("a", kind, sparsity=0, metrics=score(dense, name=name)),
        record("b", kind, metrics=score(value, name=name)),
    )
    assert cell(table, "griffin 50%", task=kind).percent == percent


@pytest.mark.parametrize(("name", "kind", "winner"), [("rouge1", "generation", "b"), ("kl", "fidelity", "c")])
def test_the_best_method_of_a_sparsity_is_bold(name: str, kind: str, winner: str) -> None:
    table = made(
        record("a", kind, sparsity=0, metrics=score(99.0, name=name)),
        record("b", kind, metrics=score(15.0, name=name)),
        record("c", kind, statistic="magnitude", metrics=score(3.0, name=name)),
        record("d", kind, sparsity=0.75, metrics=score(1.0, name=name)),  # alone at its sparsity
    )
    cells = [cell for _, cells in table.rows for cell in cells if cell is not None]
    assert [cell.run_id for cell in cells if cell.best] == [winner]
    equal = made(record("a", metrics=score(15.001)), record("b", statistic="magnitude", metrics=score(15.002)))
    assert not cell(equal, "griffin 50%").best, "equal as printed"


def test_a_task_has_rows_of_its_own_and_what_it_does_not_measure_is_a_dash() -> None:
    other = {"task_name": "coqa", "metrics": score(0.5, name="f1") | {"samples": 7}}
    table = made(record("a"), record("b", **other), record("c", model_name="llama2_7b"))
    assert table.columns == ["ROUGE-1 (F x 100) ↑", "F1 ↑", "n"]
    assert [names for names, _ in table.rows] == [
        (place, "griffin 50%") for place in ("gemma_7b, coqa", "gemma_7b, xsum", "llama2_7b, xsum")
    ]
    assert numbers(table.rows[0][1]) == [DASH, "0.5000", "7"]
    assert [line["status"] for line in lines(table)].count("none") == 3


def test_perplexity_by_length_has_a_table_of_its_own() -> None:
    metrics = scores(perplexity=9.0, perplexity_p64_g32=9.5, perplexity_p128_g32=8.5)
    whole, by_length = tables(frame([record("a", "perplexity", metrics=metrics)]))
    assert numbers(whole.rows[0][1]) == ["9.00", "4"]
    rows = [(names[-1], numbers(cells)) for names, cells in by_length.rows]
    assert rows == [("64 + 32", ["9.50", "4"]), ("128 + 32", ["8.50", "4"])]


def test_latency_shows_what_the_records_have_and_what_is_not_there_is_missing() -> None:
    always = {"decode_speedup": 1.5, "decode_limit": 1.6, "breakeven_tokens": 3.0, "samples": 5}
    never = {"decode_speedup": 0.9, "decode_limit": 1.1, "samples": 5}
    table = made(record("a", "latency", metrics=always), record("b", "latency", sparsity=0.25, metrics=never))
    assert table.columns == ["decode speed-up (x) ↑", "memory-traffic limit (x)", "break-even (tokens) ↓", "n"]
    assert [numbers(cells) for _, cells in table.rows] == [["0.90", "1.10", None, "5"], ["1.50", "1.60", "3.0", "5"]]
    assert table.missing == 1
    assert "missing" in markdown(table)
    assert "& -- &" in latex(table)
    assert [line["status"] for line in lines(table)].count("missing") == 1


def test_markdown_and_latex_survive_any_name() -> None:
    table = made(record("a", model_name="my|model_50%&\\ caf\N{LATIN SMALL LETTER E WITH ACUTE} \u6a21"))
    line = markdown(table).splitlines()[2]
    assert len(re.findall(r"(?<!\\)\|", line)) == len(table.stubs) + len(table.columns) + 1
    assert r"my\textbar{}model\_50\%\&\textbackslash{} cafe ?" in latex(table)


def test_verified_runs_have_a_table_of_their_drafts_and_others_have_none() -> None:
    drafts = {"acceptance_rate": 0.9, "tokens_per_check": 3.25, "effective_density": 0.6, "predicted_speedup": 1 / 0.6}
    verified = record("v", metrics=score(20.0) | drafts)
    verified["method"] |= {"family": "griffin verified", "label": "griffin verified 50%", "verification": "exact"}
    plain = record("p", metrics=score(15.0))
    assert [table.name for table in tables(frame([plain]))] == ["generation"]
    _, table = tables(frame([plain, verified]))
    ((names, cells),) = table.rows
    assert (table.name, *names) == ("verified", "gemma_7b, xsum", "griffin verified 50%")
    assert numbers(cells) == ["0.900", "3.25", "0.600", "1.67", "4"]


# -- LaTeX ------------------------------------------------------------------------------------------------------------

PDFLATEX = shutil.which("pdflatex")
needs_latex = pytest.mark.skipif(
    PDFLATEX is None, reason="needs pdflatex with booktabs (Debian's texlive-latex-base, texlive-latex-recommended)"
)
_DOCUMENT = "\\documentclass{{article}}\n\\usepackage{{booktabs}}\n\\begin{{document}}\n{}\n\\end{{document}}\n"


def compiled(tex: str, folder: Path) -> str:
    """The log of a document with these tables."""
    (folder / "document.tex").write_text(_DOCUMENT.format(tex), encoding="utf-8")
    command = [str(PDFLATEX), "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "document.tex"]
    ended = process(command, folder)
    assert ended.code == 0, ended.out[-2000:]
    assert (folder / "document.pdf").stat().st_size > 1000
    return ended.out


@needs_latex
def test_the_tables_of_a_report_compile(report: Path, tmp_path: Path) -> None:
    found = sorted((report / "tables").glob("*.tex"))
    assert len(found) == 10
    compiled("\n".join(path.read_text(encoding="utf-8") for path in found), tmp_path)


@needs_latex
def test_hostile_names_compile(tmp_path: Path) -> None:
    names = ["a_b^c~d", "50%&#$", "{x}\\y", "caf\N{LATIN SMALL LETTER E WITH ACUTE} \u6a21\u578b", '"<|bos|>"']
    made = [record(str(number), model_name=name, metrics=score(1.0)) for number, name in enumerate(names)]
    made.append(record("other", task_name="an_other", limit=3))
    (table,) = tables(frame(made))
    assert "Undefined control sequence" not in compiled(latex(table), tmp_path)
