"""Templates of pages, and tables as text: Markdown, LaTeX (booktabs) and CSV."""

from __future__ import annotations

import csv
import functools
import io
import unicodedata

import jinja2

from analysis.tables import DASH, Cell, Table

MISSING = "missing"

_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "‖": r"$\Vert$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "\N{MINUS SIGN}": "$-$",
    "|": r"\textbar{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    '"': "''",
}


@functools.cache
def template(name: str) -> jinja2.Template:
    """One of `templates/`. What goes into HTML is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("analysis", "templates"),
        autoescape=lambda name: name is not None and ".html" in name,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(name)


def markdown(table: Table) -> str:
    """The table in Markdown."""
    headers = [*table.stubs, *table.columns]
    rows = [headers, ["---"] * len(headers)]
    for names, cells in table.rows:
        rows.append([*(name.replace("|", "\\|") for name in names), *map(_markdown_cell, cells)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def latex(table: Table) -> str:
    """The table as a LaTeX `table` environment. The document must use the package booktabs."""
    stubs, count = len(table.stubs), len(table.columns)
    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering\\small",
        f"\\caption{{{_tex(table.title)}. {_tex(table.note)}}}",
        f"\\label{{tab:{table.name.replace('_', '-')}}}",
        f"\\begin{{tabular}}{{{'l' * stubs}{'r' * count}}}",
        "\\toprule",
    ]
    lines += [" & ".join(_tex(text) for text in (*table.stubs, *table.columns)) + " \\\\", "\\midrule"]
    before = None
    for names, cells in table.rows:
        if before is not None and names[0] != before:
            lines.append("\\midrule")
        shown = ("" if names[0] == before else names[0], *names[1:])
        before = names[0]
        lines.append(" & ".join([*(_tex(name) for name in shown), *(_latex_cell(cell) for cell in cells)]) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table}", ""])


def comma_separated(table: Table) -> str:
    """One line of CSV per cell, with all digits. A cell without a number has the status `missing`."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header = ("column", "value", "stderr", "low", "high", "change_from_dense", "best", "run_id", "status")
    writer.writerow([*table.stubs, *header])
    for names, cells in table.rows:
        for label, cell in zip(table.columns, cells, strict=True):
            if cell is None:
                writer.writerow([*names, label, *[""] * 7, MISSING])
            else:
                numbers = [
                    repr(float(value)) if value is not None else ""
                    for value in (cell.value, cell.stderr, *(cell.interval or (None, None)), cell.change)
                ]
                status = "none" if cell.words == DASH else "measured"
                writer.writerow([*names, label, *numbers, cell.best, cell.run_id, status])
    return out.getvalue()


def plain(cell: Cell | None) -> str:
    """The text of a cell, without markup."""
    return _markdown_cell(cell).replace("*", "")


def _markdown_cell(cell: Cell | None) -> str:
    if cell is None:
        return MISSING
    return " ".join([f"**{cell.number}**" if cell.best else cell.number, *cell.beside])


def _latex_cell(cell: Cell | None) -> str:
    if cell is None:
        return "--"
    number = f"\\textbf{{{cell.number}}}" if cell.best else cell.number
    return number + "".join(f" {{\\scriptsize {_tex(part)}}}" for part in cell.beside)


def _tex(text: str) -> str:
    """Text in ASCII for LaTeX. A character that has no Latin form becomes a question mark."""
    characters = []
    for character in text:
        plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
        characters.append(_LATEX.get(character, plain or "?"))
    return "".join(characters)
