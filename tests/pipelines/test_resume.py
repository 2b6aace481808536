"""Finished runs are left alone unless their files were changed; those cut off go on, and end as undisturbed.

Rows after an `offset` are those of a run over all.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from calling import Outcome, cut_off, prompts_run, ran, read_samples, run_folder, run_folders, timeless, tiny, tiny_task

from analysis.runs import read_run_folders
from pipelines import evaluation
from pipelines.run_folder import RunFolder
from pipelines.status import BROKEN_OFF, DONE, read


def test_a_finished_run_is_left_alone(
    call: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = call(*tiny(tmp_path / "out"))
    folder = run_folder(tmp_path / "out")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    monkeypatch.setattr("pipelines.evaluation.kept_model", lambda *_: pytest.fail("a model was loaded"))
    again = call(*tiny(tmp_path / "out"))
    assert again.code == 0
    assert [line for line in again.err.splitlines() if str(folder) in line and "skipped" in line]
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()} == before
    assert again.out == first.out, "the table shows finished runs too"


def cuts(content: bytes) -> dict[str, int]:
    """Where a process may die: byte positions in the samples of a run."""
    ends = [place for place, byte in enumerate(content, start=1) if byte == ord("\n")]
    inside = next(place for place in range(ends[0], ends[-1]) if content[place] & 0xC0 == 0x80)
    return {
        "before the first byte": 0,
        "within the first line": ends[0] // 2,
        "before the line break": ends[0] - 1,
        "after a whole line": ends[0],
        "within a character": inside,
        "within the last line": ends[-2] + 5,
        "after the last line": ends[-1],
    }


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["batch_size=2"],
        ["batch_size=2", "statistic=random", "selection=sample"],
        ["batch_size=2", "shared_experts=true"],  # a batch shares its experts, so its rest alone is another batch
    ],
)
def test_a_run_cut_off_at_any_byte_ends_as_undisturbed(overrides: list[str], tmp_path: Path) -> None:
    def arguments(name: str) -> list[str]:
        return tiny(tmp_path / name, *overrides, rows=5, tokens=12)

    (undisturbed,) = ran(*arguments("undisturbed"))
    places = cuts((undisturbed / "samples.jsonl").read_bytes())
    kept = list(places) if not overrides else ["before the first byte", "within a character", "within the last line"]
    for name in kept:
        folder = tmp_path / name / undisturbed.name
        shutil.copytree(undisturbed, folder)
        (folder / "record.json").unlink()
        with (folder / "samples.jsonl").open("r+b") as file:
            file.truncate(places[name])
        ran(*arguments(name))
        assert timeless(folder) == timeless(undisturbed), name


GRID = ["grid.sparsity=[0,0.5]", "grid.refresh=[none,compensation]", "compensation=ridge", "limit=4"]


def rows_of(task: str, out: Path, batch_size: int = 3) -> list[str]:
    """A grid of three methods by the kind of its task."""
    tokens = {"generation": ["task.max_new_tokens=12"], "fidelity": ["task.max_new_tokens=12"]}
    own = tokens | {"perplexity": ["task.generation_lengths=[9]"]}
    return tiny_task(task, out, *GRID, f"batch_size={batch_size}", *own.get(task, []))


@pytest.fixture
def short_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of rows that are evaluated as a whole are of one batch, so that there are some to stop between."""
    monkeypatch.setattr("pipelines.tasks.generation.BATCHES", 1)
    monkeypatch.setattr("pipelines.tasks.classification_and_qa.BATCHES", 1)
    monkeypatch.setattr("pipelines.tasks.classification_and_qa._BLOCK_DOCUMENTS", 2)


@pytest.mark.usefixtures("short_groups")
@pytest.mark.parametrize(
    ("task", "batch_size"),
    [*((task, 3) for task in ("generation", "fidelity", "perplexity", "briefs_choice", "briefs_qa")), ("briefs_qa", 1)],
)
def test_a_grid_that_was_cut_off_ends_as_undisturbed_to_the_bit(task: str, batch_size: int, tmp_path: Path) -> None:
    options = rows_of(task, tmp_path / "out", batch_size)
    whole = [timeless(folder) for folder in ran(*options)]
    folders = run_folders(tmp_path / "out")
    assert len(folders) == 3
    beside = {"samples": 4, "failed": None, "beside": [folder.name for folder in folders]}
    # None: finished, with its record; others go on beside it.
    for left in ((0, 0, 0), (3, 2, 2), (None, 1, 1), (None, None, 3), (1, 4, None)):
        for folder, kept in zip(folders, left, strict=True):
            if kept is not None:
                cut_off(folder, kept)
                (folder / "state.json").write_text(json.dumps(beside))
        ran(*options)
        assert sorted(map(str, whole)) == sorted(str(timeless(folder)) for folder in folders), left


@pytest.mark.parametrize(
    ("task", "rows"), [("generation", 1), ("generation", 11), ("briefs_qa", 1), ("briefs_choice", 5)]
)
def test_an_interrupted_grid_has_every_row_that_ended_and_knows_what_ran_beside_it(
    task: str, rows: int, call: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


def test_a_run_leaves_its_run_folder_only(
    call: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    (whole,) = ran(*tiny_task(kind, tmp_path / "all"))
    (rest,) = ran(*tiny_task(kind, tmp_path / "later", "offset=1", "limit=2"))
    assert timeless(rest)[1] == timeless(whole)[1][1:]
