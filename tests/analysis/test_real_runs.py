"""Real runs of a tiny model, from the pipeline to what users look at: records, W&B there and back, notebooks.

All tests of real runs are in this file, because making the runs takes longer than the tests.
"""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
from calling import REPOSITORY, Outcome, command, environment, process, read_record, saved_model
from loopback import KEY, LoopbackWandb, StoredRun
from nbclient import NotebookClient

from analysis.contents import make_report
from analysis.frame import frame
from analysis.runs import read_run_folders

RUNS = 10
# In a process of its own: the client keeps the server's address for as long as a process lives.
_READ = """
import json, sys
from analysis.runs import read_runs
found = [read_runs(source) for source in sys.argv[1:]]
records = [record for runs in found for record in runs.records]
problems = {problem.run_id: problem.state for runs in found for problem in runs.problems}
print(json.dumps([records, problems, {run: rows for runs in found for run, rows in runs.layers.items()}]))
"""
# Many calls in one process: most of a short call is imports.
_RUN = """
import sys
from pipelines import run
for call in open(sys.argv[1]).read().splitlines():
    sys.argv = ["run.py", *call.split()]
    run.main()  # ends the process if a run fails
"""


@dataclass(frozen=True)
class Lab:
    """Finished runs in a folder that is an empty home, too; the server has the same runs."""

    root: Path
    server: LoopbackWandb

    @property
    def out(self) -> Path:
        """The run folders."""
        return self.root / "out"

    @property
    def variables(self) -> dict[str, str]:
        """With these a process may write to the server."""
        return {"HOME": str(self.root), "WANDB_BASE_URL": self.server.url, "WANDB_API_KEY": KEY}

    def python(self, *arguments: str, **variables: str) -> Outcome:
        """A process that may write to the server."""
        return process([sys.executable, *arguments], self.root, 180, **self.variables | variables)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Every kind of table and figure has its runs here. All are in the W&B project griffin, but latency in speed."""
    root = tmp_path_factory.mktemp("lab")
    text = root / "text.txt"
    text.write_text("The ferry was late again, and two otters were seen in the harbour.\n" * 20, encoding="utf-8")
    shared = f"model=random_tiny model.architecture.num_hidden_layers=1 wandb.mode=online output_dir={root}/out"
    calls = [
        f"task=briefs limit=3 task.max_new_tokens=4 grid.statistic=[griffin,magnitude] grid.sparsity=[0,0.5] {shared}",
        f"task=fidelity limit=3 task.max_new_tokens=4 grid.sparsity=[0,0.5] {shared} wandb.mode=offline",
        f"task=perplexity limit=3 task.data_files={text} task.prompt_lengths=[16,32] task.generation_lengths=[8,16] "
        f"grid.sparsity=[0,0.5] {shared}",
        "task=latency task.repeats=2 task.prompt_lengths=[8] task.generation_lengths=[4] "
        f"sparsity=0.5 grid.statistic=[griffin,magnitude] wandb.project=speed {shared}",
        f"task=flocking limit=3 task.sequence_length=64 task.max_new_tokens=4 {shared}",
    ]
    (root / "calls").write_text("\n".join(calls), encoding="utf-8")
    with LoopbackWandb() as server:
        lab = Lab(root, server)
        ended = lab.python("-c", _RUN, "calls")
        assert ended.code == 0, ended.err
        offline = [str(path) for path in lab.out.glob("*/wandb/offline-run-*")]
        assert len(offline) == 2
        assert lab.python("-m", "wandb", "sync", *offline).code == 0
        yield lab


def read(lab: Lab, *sources: str) -> tuple[list[dict[str, Any]], dict[str, str], dict[str, list[dict[str, Any]]]]:
    """Records, problems by their runs, and measures by layer of W&B projects."""
    ended = lab.python("-c", _READ, *sources)
    assert ended.code == 0, ended.err
    records, problems, layers = json.loads(ended.out)
    return records, problems, layers


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


def test_the_frame_from_wandb_equals_that_from_the_run_folders(lab: Lab) -> None:
    records, problems, layers = read(lab, "wandb:lab/griffin", "wandb:lab/speed")
    assert problems == {}
    folders = read_run_folders([lab.out])
    assert folders.records == [read_record(path) for path in sorted(lab.out.glob("*-*"))]
    pd.testing.assert_frame_equal(frame(records), frame(folders.records), check_exact=True)
    assert {record["run_id"]: record for record in records} == {record["run_id"]: record for record in folders.records}
    ((run_id, rows),) = layers.items()
    assert run_id.startswith("flocking-")
    lines = (folders.folders[run_id] / "layers.csv").read_text(encoding="utf-8").splitlines()
    assert lines[1:] == [",".join(str(value) for value in row.values()) for row in rows]


def test_online_runs_hold_metrics_tables_and_images(lab: Lab) -> None:
    (flocking,) = [run for name, run in lab.server.runs.items() if name.startswith("flocking-")]
    assert (flocking.state, flocking.job_type) == ("finished", "flocking")
    logged = {key: value.get("_type") for key, value in flocking.summary.items() if isinstance(value, dict)}
    assert logged["layers_table"] == logged["samples_table"] == "table-file"
    images = {key for key, kind in logged.items() if kind == "image-file"}
    names = ("jaccard_sequences", "scores", "heatmap", "heatmap_sorted")
    assert {f"{name}_image" for name in names} <= images
    folder = lab.out / flocking.name.rpartition("-")[0] / "figures"
    for key in images:
        stored = lab.server.files[f"/storage/{flocking.name}/{flocking.summary[key]['path']}"]
        assert stored == (folder / f"{key.removesuffix('_image')}.png").read_bytes()


def test_a_report_is_logged_as_a_run_and_is_no_result_afterwards(lab: Lab) -> None:
    out, source = lab.root / "report", "wandb:lab/speed"
    before = {*lab.server.runs}
    ended = lab.python("-m", "analysis.report", f"runs={source}", f"out={out}", "log=wandb")
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[-1] == f"Report: {out}/index.html (2 runs, 1 tables, 1 figures)"
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
    records, problems, _ = read(lab, source)
    assert (len(records), problems) == (2, {})


def test_old_unfinished_and_foreign_runs_in_wandb(lab: Lab) -> None:
    (name,) = [name for name in lab.server.runs if name.startswith("briefs-random_tiny-griffin-50")]
    today = lab.server.runs[name]
    parts = json.loads(today.summary["record"])
    del parts["method"], parts["evaluation"]
    old = {"record": json.dumps(parts)}
    lab.server.runs["crashed"] = StoredRun("crashed", "other", state="crashed")
    lab.server.runs["foreign"] = StoredRun("foreign", "other", state="finished", summary={"loss": 1.0})
    lab.server.runs["old"] = StoredRun(name, "other", today.config, old, state="finished")
    problems = {"crashed": "unfinished", "foreign": "damaged", name: "damaged"}
    assert read(lab, "wandb:lab/other") == ([], problems, {})


def test_a_project_that_is_not_there_is_one_line(lab: Lab, tmp_path: Path) -> None:
    ended = lab.python("-m", "analysis.report", "runs=wandb:lab/nothing", f"out={tmp_path / 'report'}")
    ended.refused("error: runs=wandb:lab/nothing: ")
    assert not (tmp_path / "report").exists()


def test_an_unreachable_server_costs_the_report_one_warning(runs: Path, lab: Lab, tmp_path: Path) -> None:
    for folder in runs.glob("xsum-*"):
        shutil.rmtree(folder)
    ended = lab.python(
        *("-m", "analysis.report", f"runs={runs}", f"out={tmp_path / 'report'}", "log=wandb"),
        WANDB_BASE_URL="http://127.0.0.1:9",
    )
    assert ended.code == 0
    assert [line for line in ended.err.splitlines() if line.startswith("warning:")]
    assert (tmp_path / "report" / "index.html").is_file()
    assert list((tmp_path / "report" / "wandb").glob("offline-run-*"))


def test_the_quickstart_writes_a_report_and_says_where(tmp_path: Path) -> None:
    out = tmp_path / "out"
    shape = ["model=random_tiny", "model.architecture.num_hidden_layers=1", "limit=2", "task.max_new_tokens=2"]
    plain = 'hydra.sweeper.params.task="briefs,fidelity,flocking"'  # the tiny model has no format of conversations
    call = ["experiment=quickstart", plain, *shape, f"output_dir={out}"]
    ended = process(command(*call), tmp_path, HOME=str(tmp_path))
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[-1] == f"Report: {out}/report/index.html (10 runs, 7 tables, 10 figures)"
    sentence = (
        r"\nexact 50%: 2 of 2 texts are the dense model's, at [\d.]+ of its bytes per token \(briefs, random_tiny\)\.\n"
    )
    assert re.search(sentence, ended.out)
    assert re.search(
        r"\nKL from the dense model, in nats per token: int8 .*\(fidelity, random_tiny, n = 2\)\.\n", ended.out
    )
    assert "green" not in ended.out, "nobody would see the colours"
    page = (out / "report" / "index.html").read_text(encoding="utf-8")
    assert page.count("python -m pipelines.run task=briefs experiment=quickstart") >= 5
    assert page.count("python -m pipelines.run task=flocking experiment=quickstart") >= 1


NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_thin_and_hold_no_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert sum(len(cell.source.splitlines()) for cell in code) < 70


def executed(name: str, change: tuple[str, str], lab: Lab, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """How many figures a notebook shows, and its text, with another value of the variable that a user sets."""
    for variable, value in environment(**lab.variables).items():
        monkeypatch.setenv(variable, value)
    notebook = nbformat.read(REPOSITORY / "notebooks" / f"{name}.ipynb", as_version=4)
    variable, value = change
    (cell,) = [cell for cell in notebook.cells if f"{variable} = " in cell.source]
    cell.source = f"{variable} = {value!r}"
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(lab.root)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output.get("data", {}) for output in outputs]
    texts = [output.get("text", "") for output in outputs if output.get("name") == "stdout"]
    texts += [data.get(f"text/{kind}", "") for data in shown for kind in ("markdown", "plain")]
    return sum("image/png" in data for data in shown), "".join(texts)


def test_the_notebook_of_results_runs_on_run_folders_and_on_wandb(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    figures, text = executed("results", ("SOURCE", str(lab.out)), lab, monkeypatch)
    assert figures == 1
    assert "briefs, random_tiny: griffin 50% less dense" in text
    assert text.count("### Sample") == text.count("--- griffin 50%: rouge1") == 3
    figures, text = executed("results", ("SOURCE", "wandb:lab/griffin"), lab, monkeypatch)
    assert figures == 0
    assert "griffin 50%" in text
    assert "no answers here" in text


def test_the_notebook_of_flocking_looks_into_any_model(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(saved_model(tmp_path / "model"))
    figures, text = executed("flocking", ("MODEL", model), lab, monkeypatch)
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
