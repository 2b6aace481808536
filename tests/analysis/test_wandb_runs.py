"""W&B there and back, with its real client: what the tracker logs online is what the analysis reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from lab import Lab, plain_environment
from loopback import KEY, LoopbackWandb, StoredRun

from analysis.frame import frame
from analysis.run_folders import read_run_folders

# In a process of its own: the client keeps the server's address for as long as a process lives.
_READ = """
import json, sys
from analysis.sources import read_runs
runs = read_runs(sys.argv[1])
print(json.dumps([runs.records, [vars(problem) for problem in runs.problems], runs.layers]))
"""


def test_the_server_knew_every_operation_and_the_key_came_with_each(lab: Lab) -> None:
    assert lab.server.operations
    assert lab.server.unknown == []
    assert lab.server.authorized


def test_the_frame_from_wandb_equals_that_from_the_run_folders(lab: Lab) -> None:
    ended = lab.python("-c", _READ, lab.project)
    assert ended.returncode == 0, ended.stderr
    records, problems, layers = json.loads(ended.stdout)
    assert problems == []
    folders = read_run_folders([lab.out])
    pd.testing.assert_frame_equal(frame(records), frame(folders.records), check_exact=True)
    by_id = {record["run_id"]: record for record in records}
    assert by_id == {record["run_id"]: record for record in folders.records}
    ((run_id, rows),) = layers.items()
    assert run_id.startswith("flocking-")
    lines = (folders.folders[run_id] / "layers.csv").read_text(encoding="utf-8").splitlines()
    assert lines[1:] == [",".join(str(value) for value in row.values()) for row in rows]


def test_online_runs_hold_metrics_tables_and_images(lab: Lab) -> None:
    (flocking,) = [run for name, run in lab.server.runs.items() if name.startswith("flocking-")]
    assert (flocking.state, flocking.job_type) == ("finished", "flocking")
    kinds = {
        key: value["_type"] for key, value in flocking.summary.items() if isinstance(value, dict) and "_type" in value
    }
    assert kinds["layers_table"] == kinds["samples_table"] == "table-file"
    images = {key for key, kind in kinds.items() if kind == "image-file"}
    assert {
        "jaccard_sequences_image",
        "scores_image",
        "heatmap_layer00_image",
        "heatmap_layer00_sorted_image",
    } <= images
    folder = lab.out / flocking.name / "figures"
    for key in images:
        stored = lab.server.files[f"/storage/{flocking.name}/{flocking.summary[key]['path']}"]
        assert stored == (folder / f"{key.removesuffix('_image')}.png").read_bytes()


def test_a_report_is_logged_as_a_run_and_is_no_result_afterwards(lab: Lab, tmp_path: Path) -> None:
    out = tmp_path / "report"
    before = {*lab.server.runs}
    ended = lab.python("-m", "analysis.report", f"runs={lab.project}", f"out={out}", "log=wandb")
    assert ended.returncode == 0, ended.stderr
    assert "10 runs" in ended.stdout
    (name,) = {*lab.server.runs} - before
    run = lab.server.runs[name]
    assert (run.state, run.job_type, run.project) == ("finished", "report", "griffin")
    for figure in (out / "figures").glob("*.png"):
        assert run.summary[f"{figure.stem}_image"]["_type"] == "image-file"
    for table in (out / "tables").glob("*.csv"):
        assert run.summary[f"{table.stem}_table"]["_type"] == "table-file"
    place = run.summary["runs_table"]["path"]
    rows = json.loads(lab.server.files[f"/storage/{name}/{place}"])
    assert len(rows["data"]) == len(frame(read_run_folders([lab.out]).records))
    again = lab.python("-c", _READ, lab.project)
    records, problems, _ = json.loads(again.stdout)
    assert (len(records), problems) == (10, [])
    assert lab.server.unknown == []


def test_unfinished_and_foreign_runs_are_told(lab: Lab) -> None:
    lab.server.runs["crashed"] = StoredRun("crashed", "other", state="crashed")
    lab.server.runs["foreign"] = StoredRun("foreign", "other", state="finished", summary={"loss": 1.0})
    ended = lab.python("-c", _READ, "wandb:lab/other")
    records, problems, _ = json.loads(ended.stdout)
    assert records == []
    assert [(problem["run_id"], problem["state"]) for problem in problems] == [
        ("crashed", "unfinished"),
        ("foreign", "damaged"),
    ]


def test_a_project_that_is_not_there_is_one_line(lab: Lab, tmp_path: Path) -> None:
    ended = lab.python("-m", "analysis.report", "runs=wandb:lab/nothing", f"out={tmp_path / 'report'}")
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: runs=wandb:lab/nothing: ")
    assert not (tmp_path / "report").exists()


def test_no_file_holds_the_key(lab: Lab, report: Path) -> None:
    files = [path for path in lab.root.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 100
    assert [str(path) for path in files if KEY.encode() in path.read_bytes()] == []


def test_what_was_logged_offline_reads_the_same_after_a_sync(tmp_path: Path) -> None:
    with LoopbackWandb() as server:
        variables = plain_environment(tmp_path) | {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        lab = Lab(tmp_path, tmp_path / "out", server, variables)
        options = ["model=random_tiny", "task=briefs", "limit=2", "task.max_new_tokens=3", f"output_dir={lab.out}"]
        assert lab.python("-m", "pipelines.run", *options).returncode == 0
        (offline,) = lab.out.glob("*/wandb/offline-run-*")
        assert lab.python("-m", "wandb", "sync", str(offline)).returncode == 0
        ended = lab.python("-c", _READ, lab.project)
        assert ended.returncode == 0, ended.stderr
        assert json.loads(ended.stdout)[0] == read_run_folders([lab.out]).records
        assert server.unknown == []


def test_an_unreachable_server_costs_the_report_one_warning(few_runs: Path, lab: Lab, tmp_path: Path) -> None:
    for folder in few_runs.glob("latency-*"):
        shutil.rmtree(folder)
    ended = lab.python(
        *("-m", "analysis.report", f"runs={few_runs}", f"out={tmp_path / 'report'}", "log=wandb"),
        WANDB_BASE_URL="http://127.0.0.1:9",
    )
    assert ended.returncode == 0
    assert [line for line in ended.stderr.splitlines() if line.startswith("warning:")]
    assert (tmp_path / "report" / "index.html").is_file()
    assert list((tmp_path / "report" / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize("operation", ["Nonsense"])
def test_the_server_refuses_what_it_does_not_know(operation: str) -> None:
    server = LoopbackWandb()
    assert "errors" in server.answer(operation, {}, f"query {operation} {{ x }}")
    assert server.unknown
