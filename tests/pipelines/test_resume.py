"""Finished runs are left alone unless their files were changed; those cut off go on, and end as undisturbed.

Rows after an `offset` are those of a run over all.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from calling import Entry, cut_off, prompts_run, ran, read_samples, run_folder, run_folders, timeless, tiny

from analysis.runs import read_run_folders
from pipelines import evaluation
from pipelines.run_folder import RunFolder
from pipelines.status import BROKEN_OFF, DONE, read
from pipelines.tracking import Media


def test_a_finished_run_is_left_alone(call: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = call(*tiny(tmp_path / "out"))
    folder = run_folder(tmp_path / "out")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    monkeypatch.setattr("pipelines.evaluation.kept_model", lambda *_: pytest.fail("a model was loaded"))
    again = call(*tiny(tmp_path / "out"))
    assert again.code == 0
    assert [line for line in again.err.splitlines() if str(folder) in line and "skipped" in line]
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()} == before
    assert again.out == first.out, "the table shows finished runs too"


def rows_of(task: str, out: Path, *more: str) -> list[str]:
    """Three methods on four rows of a task, in batches of three; later overrides win."""
    grid = ["grid.sparsity=[0,0.5]", "grid.refresh=[none,compensation]", "compensation=ridge", "batch_size=3"]
    return tiny(out, *grid, *more, task=task, rows=4, tokens=12)


@pytest.fixture
def short_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of rows that are evaluated as a whole are of one batch, so that there are some to stop between."""
    monkeypatch.setattr("pipelines.tasks.generation.BATCHES", 1)
    monkeypatch.setattr("pipelines.tasks.classification_and_qa.BATCHES", 1)
    monkeypatch.setattr("pipelines.tasks.classification_and_qa._BLOCK_DOCUMENTS", 2)
    monkeypatch.setattr("pipelines.tasks.flocking.media", lambda *_: Media())  # figures take most of the time


@pytest.mark.usefixtures("short_groups")
@pytest.mark.parametrize(
    ("task", "more"),
    [
        *((task, "") for task in ("generation", "fidelity", "perplexity", "briefs_choice", "briefs_qa")),
        *(("briefs_qa", "batch_size=1"), ("flocking", "")),
        ("generation", "statistic=random selection=sample"),
        ("generation", "shared_experts=true"),  # by a batch, whose rest alone is another one
        ("generation", "batch_size=1 grid.verification=[none,exact]"),
        ("generation", "batch_size=1 grid.verification=[none,exact] task.decoding=reference_sampling"),
        ("generation", "batch_size=1 verification=threshold draft_tokens=2 task.decoding=reference_sampling"),
    ],
)
def test_a_grid_that_was_cut_off_ends_as_undisturbed_to_the_bit(task: str, more: str, tmp_path: Path) -> None:
    options = rows_of(task, tmp_path / "out", *more.split())
    folders = ran(*options)
    whole = [timeless(folder) for folder in folders]
    assert len(folders) == (1 if task == "flocking" else 5 if "none,exact" in more else 3)
    beside = {"samples": 4, "failed": None, "beside": [folder.name for folder in folders]}
    # None: finished, with its record; others go on beside it.
    for left in ((0, 0, 0, 2, 0), (3, 2, 2, 1, 3), (None, 1, 1, 0, 2), (None, None, 3, None, 3), (1, 4, None, 4, 1)):
        for folder, kept in zip(folders, left, strict=False):
            if kept is not None:
                cut_off(folder, kept)
                (folder / "state.json").write_text(json.dumps(beside))
        ran(*options)
        assert [timeless(folder) for folder in folders] == whole, left


@pytest.mark.parametrize(
    ("task", "rows"), [("generation", 1), ("generation", 11), ("briefs_qa", 1), ("briefs_choice", 5)]
)
def test_an_interrupted_grid_has_every_row_that_ended_and_knows_what_ran_beside_it(
    task: str, rows: int, call: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = rows_of(task, tmp_path / "out")
    evaluated = evaluation.evaluated

    def interrupted(*arguments: Any) -> Iterator[Any]:
        for number, batch in enumerate(evaluated(*arguments)):
            if number == rows:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluated", interrupted)
        ended = call(*options)
    assert ended.code == 128 + 2
    assert "Traceback" not in ended.err
    assert ended.err.splitlines()[-1].startswith("interrupted; the same command continues")
    folders = run_folders(tmp_path / "out")
    written = [read_samples(folder) for folder in folders if (folder / "samples.jsonl").exists()]
    assert rows <= sum(map(len, written)) < 12
    for folder in folders:
        if not (folder / "record.json").exists():
            state = RunFolder(tmp_path / "out", folder.name).state()
            assert sorted(state["beside"]) == [other.name for other in folders]
    ran(*options)
    undisturbed = ran(*rows_of(task, tmp_path / "undisturbed" / "out"))
    assert {str(timeless(folder)) for folder in folders} == {str(timeless(folder)) for folder in undisturbed}


def test_a_gap_in_the_samples_is_filled_and_what_is_there_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder,) = ran(*tiny(tmp_path / "out", rows=5))
    undisturbed = timeless(folder)
    cut_off(folder)
    lines = (folder / "samples.jsonl").read_bytes().splitlines(keepends=True)
    kept = b"".join(lines[:1] + lines[3:])
    (folder / "samples.jsonl").write_bytes(kept)
    prompts = prompts_run(monkeypatch)
    ran(*tiny(tmp_path / "out", rows=5))
    assert len(prompts) == 2
    assert (folder / "samples.jsonl").read_bytes().startswith(kept)
    assert timeless(folder) == undisturbed


def test_a_run_leaves_its_run_folder_only(call: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Hydra would make outputs/<date>/<time> in the current folder, and multirun.yaml beside it.
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    assert call(*tiny(tmp_path / "out")).code == 0
    assert list((tmp_path / "out").iterdir()) == [run_folder(tmp_path / "out")]
    files = sorted(path.name for path in run_folder(tmp_path / "out").iterdir())
    assert files == ["config.yaml", "record.json", "samples.jsonl"]
    assert call("-m", *tiny(tmp_path / "swept", "sparsity=0,0.5")).code == 0
    assert len(run_folders(tmp_path / "swept")) == 2
    assert list(cwd.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["articles.jsonl", "cwd", "out", "swept"]


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


@pytest.mark.parametrize("kind", ["generation", "fidelity", "perplexity", "briefs_choice", "flocking"])
def test_rows_after_an_offset_are_those_of_a_run_over_all(kind: str, tmp_path: Path) -> None:
    (whole,) = ran(*tiny(tmp_path / "all", task=kind))
    (rest,) = ran(*tiny(tmp_path / "later", "offset=1", "limit=2", task=kind))
    assert timeless(rest)[1] == timeless(whole)[1][1:]
