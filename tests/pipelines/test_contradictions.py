"""Files of a finished run that were changed: `run`, `status` and the report agree, and the run is done again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from calling import ran, timeless, tiny

from analysis.run_folders import read_run_folders
from pipelines.sweeps.progress import BROKEN_OFF, DONE, read

# The file, and what is replaced in it.
CHANGES: dict[str, tuple[str, bytes, bytes]] = {
    "samples are gone": ("samples.jsonl", b"", b""),
    "a sample is cut": ("samples.jsonl", rb".{20}\Z", b""),
    "a sample is spoilt": ("samples.jsonl", rb"\A.*", b"\xff"),
    "a sample is lost": ("samples.jsonl", rb"\A.*\n", b""),
    "a score is improved": ("samples.jsonl", rb'"rouge1": [\d.]+', b'"rouge1": 100.0'),
    "a text is worded otherwise": ("samples.jsonl", rb'"text": "', b'"text": "Not '),
    "a metric is improved": ("record.json", rb'"rouge1": [\d.]+', b'"rouge1": 100.0'),
    "an error is hidden": ("record.json", rb'"rouge1_stderr": [\d.]+', b'"rouge1_stderr": 0.0'),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_run_is_contradicted_everywhere_and_done_again(change: str, tmp_path: Path) -> None:
    options = tiny(tmp_path / "out")
    (folder,) = ran(*options)
    whole = timeless(folder)
    name, before, after = CHANGES[change]
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if before:
        (folder / name).write_bytes(re.sub(before, after, content, count=1, flags=re.DOTALL if b"Z" in before else 0))
    (problem,) = read_run_folders([tmp_path / "out"]).problems
    assert (problem.run_id, problem.state) == (folder.name, "contradicted")
    (row,) = read(tmp_path / "out")
    assert row.state == BROKEN_OFF
    assert row.reason == f"{problem.reason}; the next call of its command mends it"
    ran(*options)
    assert timeless(folder) == whole
    assert read_run_folders([tmp_path / "out"]).problems == []
    (row,) = read(tmp_path / "out")
    assert row.state == DONE
