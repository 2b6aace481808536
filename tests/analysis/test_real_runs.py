"""Real runs of a tiny model, from the pipeline to what users look at: records, W&B there and back, notebooks.

All tests of real runs are in this file, because making the runs takes longer than the tests.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
from lab import REPOSITORY, Lab
from loopback import KEY, LoopbackWandb, StoredRun
from nbclient import NotebookClient
from omegaconf import OmegaConf

from analysis.contents import make_report
from analysis.frame import frame
from analysis.run_folders import read_run_folders
from pipelines.config import ModelConfig
from pipelines.models import load

# In a process of its own: the client keeps the server's address for as long as a process lives.
_READ = """
import json, sys
from analysis.sources import read_runs
found = [read_runs(source) for source in sys.argv[1:]]
records = [record for runs in found for record in runs.records]
problems = [vars(problem) for runs in found for problem in runs.problems]
print(json.dumps([records, problems, {run: rows for runs in found for run, rows in runs.layers.items()}]))
"""
RUNS = 10


def test_every_table_and_figure_has_its_runs(lab: Lab) -> None:
    report = make_report(str(lab.out))
    assert report.runs.problems == []
    assert len(report.runs.records) == RUNS
    assert [table.name for table in report.tables] == [
        *("generation", "perplexity", "fidelity", "perplexity_lengths", "critical_sparsity", "differences"),
        *("verified", "latency", "flocking", "flocking_generation"),
    ]
    # Where one pruned run is all there is, the tables show it.
    assert [len(group.drawings) for group in report.groups] == [1, 1, 2, 0, 0, 1, 6]
    (answers,) = report.answers
    assert [[answer.method for answer in one.answers] for one in answers.samples] == [
        ["dense", "griffin 50%", "magnitude 50%"]
    ] * 3


def test_records_are_read_as_they_are_and_those_of_an_unknown_version_are_refused(lab: Lab, tmp_path: Path) -> None:
    written = {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in lab.out.glob("*/record.json")}
    assert {record["run_id"]: record for record in read_run_folders([lab.out]).records} == written
    for run_id, record in written.items():
        (tmp_path / run_id).mkdir()
        old = {key: value for key, value in record.items() if key not in ("method", "evaluation")}
        (tmp_path / run_id / "record.json").write_text(json.dumps(old), encoding="utf-8")
        shutil.copy(lab.out / run_id / "samples.jsonl", tmp_path / run_id)
    found = read_run_folders([tmp_path])
    assert found.records == []
    assert all("unknown version" in problem.reason for problem in found.problems)
    assert len(found.problems) == len(written)


def test_the_frame_from_wandb_equals_that_from_the_run_folders(lab: Lab) -> None:
    ended = lab.python("-c", _READ, lab.project, "wandb:lab/speed")
    assert ended.returncode == 0, ended.stderr
    records, problems, layers = json.loads(ended.stdout)
    assert problems == []
    folders = read_run_folders([lab.out])
    pd.testing.assert_frame_equal(frame(records), frame(folders.records), check_exact=True)
    assert {record["run_id"]: record for record in records} == {record["run_id"]: record for record in folders.records}
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
    folder = lab.out / flocking.name.rpartition("-")[0] / "figures"
    for key in images:
        stored = lab.server.files[f"/storage/{flocking.name}/{flocking.summary[key]['path']}"]
        assert stored == (folder / f"{key.removesuffix('_image')}.png").read_bytes()


def test_a_report_is_logged_as_a_run_and_is_no_result_afterwards(lab: Lab) -> None:
    out, source = lab.root / "report", "wandb:lab/speed"
    before = {*lab.server.runs}
    ended = lab.python("-m", "analysis.report", f"runs={source}", f"out={out}", "log=wandb")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == f"Report: {out}/index.html (2 runs, 1 tables, 1 figures)"
    (name,) = {*lab.server.runs} - before
    run = lab.server.runs[name]
    assert (run.state, run.job_type, run.project) == ("finished", "report", "speed")
    (figure,) = (out / "figures").glob("*.png")
    assert run.summary[f"{figure.stem}_image"]["_type"] == "image-file"
    assert run.summary["latency_table"]["_type"] == "table-file"
    latency = [*lab.out.glob("latency-*")]
    place = run.summary["runs_table"]["path"]
    rows = json.loads(lab.server.files[f"/storage/{name}/{place}"])
    assert len(rows["data"]) == len(frame(read_run_folders(latency).records))
    again = lab.python("-c", _READ, source)
    records, problems, _ = json.loads(again.stdout)
    assert (len(records), problems) == (2, [])


def test_old_unfinished_and_foreign_runs_in_wandb(lab: Lab) -> None:
    (name,) = [name for name in lab.server.runs if name.startswith("briefs-random_tiny-griffin-50")]
    today = lab.server.runs[name]
    parts = json.loads(today.summary["record"])
    del parts["method"], parts["evaluation"]
    old = {"record": json.dumps(parts)}
    lab.server.runs["crashed"] = StoredRun("crashed", "other", state="crashed")
    lab.server.runs["foreign"] = StoredRun("foreign", "other", state="finished", summary={"loss": 1.0})
    lab.server.runs["old"] = StoredRun(name, "other", today.config, old, state="finished")
    ended = lab.python("-c", _READ, "wandb:lab/other")
    records, problems, _ = json.loads(ended.stdout)
    assert records == []
    states = {problem["run_id"]: problem["state"] for problem in problems}
    assert states == {"crashed": "unfinished", "foreign": "damaged", name: "damaged"}


def test_a_project_that_is_not_there_is_one_line(lab: Lab, tmp_path: Path) -> None:
    ended = lab.python("-m", "analysis.report", "runs=wandb:lab/nothing", f"out={tmp_path / 'report'}")
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: runs=wandb:lab/nothing: ")
    assert not (tmp_path / "report").exists()


def test_an_unreachable_server_costs_the_report_one_warning(runs: Path, lab: Lab, tmp_path: Path) -> None:
    for folder in runs.glob("xsum-*"):
        shutil.rmtree(folder)
    ended = lab.python(
        *("-m", "analysis.report", f"runs={runs}", f"out={tmp_path / 'report'}", "log=wandb"),
        WANDB_BASE_URL="http://127.0.0.1:9",
    )
    assert ended.returncode == 0
    assert [line for line in ended.stderr.splitlines() if line.startswith("warning:")]
    assert (tmp_path / "report" / "index.html").is_file()
    assert list((tmp_path / "report" / "wandb").glob("offline-run-*"))


NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_thin_and_hold_no_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert sum(len(cell.source.splitlines()) for cell in code) < 70


def executed(name: str, change: tuple[str, str], lab: Lab, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """How many figures a notebook shows, and its text, with another value of the variable that a user sets."""
    for variable, value in lab.variables.items():
        monkeypatch.setenv(variable, value)
    notebook = nbformat.read(REPOSITORY / "notebooks" / f"{name}.ipynb", as_version=4)
    variable, value = change
    (cell,) = [cell for cell in notebook.cells if f"{variable} = " in cell.source]
    cell.source = f"{variable} = {value!r}"
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(lab.root)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown: list[Any] = [output.get("data", {}) for output in outputs]
    text = "".join(output.get("text", "") for output in outputs if output.get("name") == "stdout")
    return (
        sum("image/png" in data for data in shown),
        text + "".join(data.get("text/markdown", "") + data.get("text/plain", "") for data in shown),
    )


def test_the_notebook_of_results_runs_on_run_folders(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    figures, text = executed("results", ("SOURCE", str(lab.out)), lab, monkeypatch)
    assert figures == 1
    assert "briefs, random_tiny: griffin 50% less dense" in text
    assert text.count("### Sample") == 3
    assert text.count("--- griffin 50%: rouge1") == 3


def test_the_notebook_of_results_runs_on_wandb(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    figures, text = executed("results", ("SOURCE", lab.project), lab, monkeypatch)
    assert figures == 0
    assert "griffin 50%" in text
    assert "no answers here" in text


def test_the_notebook_of_flocking_looks_into_any_model(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = OmegaConf.load(REPOSITORY / "conf" / "model" / "random_tiny.yaml").architecture
    loaded = load(ModelConfig("tiny", "random", dtype="float32", architecture=dict(shape)), "cpu", 0)
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    figures, text = executed("flocking", ("MODEL", str(tmp_path)), lab, monkeypatch)
    assert figures == 2
    assert text.startswith("3 layers, ")


# Last: by now all that talks to the server has done so.


def test_the_server_knew_every_operation_and_the_key_came_with_each(lab: Lab) -> None:
    assert lab.server.operations
    assert lab.server.unknown == []
    assert lab.server.authorized
    assert "errors" in LoopbackWandb().answer("Nonsense", {}, "query Nonsense { x }"), "it would tell"


def test_no_file_holds_the_key(lab: Lab) -> None:
    files = [path for path in lab.root.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 100
    assert [str(path) for path in files if KEY.encode() in path.read_bytes()] == []
