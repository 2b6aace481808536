"""The LaTeX tables compile, with any name in them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from made import record, score

from analysis.frame import frame
from analysis.render import latex
from analysis.tables import tables

PDFLATEX = shutil.which("pdflatex")

pytestmark = pytest.mark.skipif(
    PDFLATEX is None, reason="needs pdflatex with booktabs (Debian's texlive-latex-base, texlive-latex-recommended)"
)

_DOCUMENT = "\\documentclass{{article}}\n\\usepackage{{booktabs}}\n\\begin{{document}}\n{}\n\\end{{document}}\n"


def compiled(tex: str, folder: Path) -> str:
    """The log of a document with these tables."""
    (folder / "document.tex").write_text(_DOCUMENT.format(tex), encoding="utf-8")
    command = [str(PDFLATEX), "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "document.tex"]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:]
    assert (folder / "document.pdf").stat().st_size > 1000
    return ended.stdout


def test_the_tables_of_a_report_compile(report: Path, tmp_path: Path) -> None:
    found = sorted((report / "tables").glob("*.tex"))
    assert len(found) == 10
    compiled("\n".join(path.read_text(encoding="utf-8") for path in found), tmp_path)


def test_hostile_names_compile(tmp_path: Path) -> None:
    names = ["a_b^c~d", "50%&#$", "{x}\\y", "caf\N{LATIN SMALL LETTER E WITH ACUTE} \u6a21\u578b", '"<|bos|>"']
    made = [record(str(number), model_name=name, metrics=score(1.0)) for number, name in enumerate(names)]
    made.append(record("other", task_name="an_other", limit=3))
    (table,) = tables(frame(made))
    assert "Undefined control sequence" not in compiled(latex(table), tmp_path)
