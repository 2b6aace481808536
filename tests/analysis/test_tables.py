"""Tables: every number is a record's, what is better is bold, what is not there is missing."""

from __future__ import annotations

import csv
import io
import re

import pytest
from made import Record, record, score

from analysis.frame import frame
from analysis.render import comma_separated, latex, markdown
from analysis.tables import Cell, Table, tables


def made(*records: Record) -> Table:
    (table,) = tables(frame(records))
    return table


def cell(table: Table, method: str, column: int = 0, model: str = "gemma_7b") -> Cell | None:
    (found,) = [cells for names, cells in table.rows if names[:2] == (model, method)]
    return found[column]


def number(table: Table, method: str, column: int = 0) -> Cell:
    found = cell(table, method, column)
    assert found is not None
    return found


def test_perplexity_has_an_interval_above_zero() -> None:
    table = made(record("a", "perplexity", metrics=score(10.0, 12.0, "perplexity")))
    found = number(table, "griffin 50%")
    assert (found.error, found.ends) == ("", "[3.01, 33.20]")  # 10 / e^1.2 and 10 e^1.2
    assert "| 10.00 [3.01, 33.20] |" in markdown(table)
    line, _ = csv.DictReader(io.StringIO(comma_separated(table)))
    assert float(line["stderr"]) == 12.0


def test_an_error_of_zero_is_not_printed() -> None:
    assert "±" not in "".join(line for line in markdown(made(record("a", metrics=score(12.0, 0.0)))).splitlines())


def test_numbers_and_errors_are_the_records_to_the_printed_digit() -> None:
    table = made(record("a", metrics=score(12.34567, 0.98765)))
    found = number(table, "griffin 50%")
    assert (found.number, found.error) == (f"{12.34567:.2f}", f"{0.98765:.2f}")
    assert found.run_id == "a"
    line, count = csv.DictReader(io.StringIO(comma_separated(table)))
    assert (count["metric"], float(count["value"])) == ("n", 4.0)
    assert (float(line["value"]), float(line["stderr"])) == (12.34567, 0.98765)


def test_changes_are_relative_to_dense_of_the_same_model_and_task() -> None:
    table = made(
        record("a", sparsity=0, metrics=score(20.0)),
        record("b", metrics=score(15.0)),
        record("c", metrics=score(15.0), limit=10),  # dense was not run with this limit
    )
    columns = [group for group, _ in table.columns]
    assert columns == ["xsum [limit=10]", "xsum [limit=null]", ""]
    alone, compared = cell(table, "griffin 50%", 0), cell(table, "griffin 50%", 1)
    assert alone is not None
    assert alone.percent == ""
    assert compared is not None
    assert compared.percent == "\N{MINUS SIGN}25.0%"
    assert cell(table, "dense", 0) is None
    assert number(table, "dense", 1).percent == ""


def test_far_from_dense_is_a_factor_and_dense_zero_has_no_change() -> None:
    far = made(
        record("a", "perplexity", sparsity=0, metrics=score(10.0, name="perplexity")),
        record("b", "perplexity", metrics=score(31560.0, name="perplexity")),
    )
    assert number(far, "griffin 50%").percent == "3,156x dense"
    zero = made(
        record("a", "fidelity", sparsity=0, metrics=score(0.0, name="kl")),
        record("b", "fidelity", metrics=score(0.5, name="kl")),
    )
    assert number(zero, "griffin 50%").percent == ""


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


def test_of_what_is_equal_as_printed_none_is_best() -> None:
    table = made(record("a", metrics=score(15.001)), record("b", statistic="magnitude", metrics=score(15.002)))
    assert not number(table, "griffin 50%").best
    assert not number(table, "magnitude 50%").best


def test_every_row_says_of_how_many_samples_it_is() -> None:
    table = made(record("a"), record("b", task_name="cnn_dailymail", metrics=score(9.0) | {"samples": 7}))
    assert table.columns[-1] == ("", "n")
    assert number(table, "griffin 50%", -1).number == "4, 7"


def test_what_was_not_run_is_missing_everywhere() -> None:
    other = {"task_name": "cnn_dailymail"}
    table = made(record("a"), record("b", **other), record("c", statistic="wanda"))
    assert table.missing == 1
    assert "missing" in markdown(table)
    assert " & -- " in latex(table) or "& -- \\\\" in latex(table)
    rows = list(csv.DictReader(io.StringIO(comma_separated(table))))
    assert [row["status"] for row in rows].count("missing") == 1
    assert [row["value"] for row in rows].count("") == 1


def test_models_and_methods_down_tasks_across() -> None:
    table = made(record("a"), record("b", model_name="llama2_7b"), record("c", task_name="cnn_dailymail"))
    assert [names for names, _ in table.rows] == [("gemma_7b", "griffin 50%"), ("llama2_7b", "griffin 50%")]
    assert [group for group, _ in table.columns] == ["cnn_dailymail", "xsum", ""]


def test_perplexity_by_length_has_a_table_of_its_own() -> None:
    numbers = {
        **score(9.0, name="perplexity"),
        **score(9.5, name="perplexity_p64_g32"),
        **score(8.5, name="perplexity_p128_g32"),
    }
    whole, lengths = tables(frame([record("a", "perplexity", metrics=numbers)]))
    assert number(whole, "griffin 50%").number == "9.00"
    assert [(names, [one and one.number for one in cells]) for names, cells in lengths.rows] == [
        (("gemma_7b", "griffin 50%", "64"), ["9.50", "4"]),
        (("gemma_7b", "griffin 50%", "128"), ["8.50", "4"]),
    ]


def test_latency_shows_what_the_records_have() -> None:
    numbers = {"decode_speedup": 1.5, "decode_limit": 1.6, "breakeven_tokens": 3.0, "samples": 5}
    never = {"decode_speedup": 0.9, "decode_limit": 1.1, "samples": 5}
    table = made(record("a", "latency", metrics=numbers), record("b", "latency", sparsity=0.25, metrics=never))
    assert [label for _, label in table.columns] == [
        "decode speed-up (x) ↑",
        "memory-traffic limit (x)",
        "break-even (tokens) ↓",
        "n",
    ]
    (quarter, half) = [cells for _, cells in table.rows]
    assert [one and one.number for one in half] == ["1.50", "1.60", "3.0", "5"]
    assert quarter[2] is None


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
    assert table.name == "verified"
    ((names, cells),) = table.rows
    assert names == ("gemma_7b, xsum", "griffin verified 50%")
    assert [found.number for found in cells if found] == ["0.900", "3.25", "0.600", "1.67", "4"]
