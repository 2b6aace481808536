"""Sweeps: what is planned, grouped, skipped and told; a worker that dies takes nobody with it."""

import json
import os
import signal
import weakref
from pathlib import Path
from typing import Any

import forked
import pytest
from calling import Entry, by_hydra, command, composed, read_record, read_samples, run_folders, tiny

from pipelines import models, status
from pipelines.composition import CONF
from pipelines.run_folder import RunFolder
from pipelines.sweeps import FAILED, ManifestEntry
from pipelines.tasks import generation

LAUNCHERS = sorted(path.stem for path in (CONF / "launcher").glob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_composes_requeues_and_names_no_site(launcher: str) -> None:
    composed_hydra = by_hydra([f"launcher={launcher}"], return_hydra_config=True).hydra
    preset, mode = composed_hydra["launcher"], composed_hydra["mode"]
    # Else `launcher=slurm` without -m would load the model on the login node.
    assert (mode and mode.name) == (None if launcher == "local" else "MULTIRUN")
    if launcher.startswith("slurm"):
        assert [preset[key] for key in ("partition", "account", "qos", "constraint", "setup")] == [None] * 5
        assert preset["additional_parameters"] == {"requeue": True}
        assert min(preset[key] for key in ("timeout_min", "mem_gb", "array_parallelism", "max_num_timeout")) > 0
        assert (preset["gpus_per_node"] or 0) == (1 if launcher == "slurm_gpu" else 0)
    # Groups are composed one by one, so one experiment stands for all where none sets anything of the launcher's.
    experiment = EXPERIMENTS[0]
    assert composed(f"experiment={experiment}", f"launcher={launcher}") == composed(f"experiment={experiment}")
    texts = [(CONF / "experiment" / f"{name}.yaml").read_text(encoding="utf-8") for name in EXPERIMENTS]
    assert [text for text in texts if "override /launcher" in text or "launcher:" in text] == []


def test_a_sweep_tells_what_became_of_each_point(call: Entry, tmp_path: Path) -> None:
    swept = call("-m", *tiny(tmp_path / "out", "sparsity=0,0.5,1", "batch_size=1,0"))
    assert swept.code == 1
    table = swept.out.split("\n\n")[-2]
    assert swept.out.splitlines()[-1] == "2 finished, 4 failed"
    rows = {" ".join(line.split()[:2]): " ".join(line.split()[2:]) for line in table.splitlines()}
    assert rows["sparsity=0.5 batch_size=1"] == "griffin 50% finished"
    records = [read_record(folder) for folder in run_folders(tmp_path / "out")]
    assert sorted(record["config"]["sparsity"] for record in records) == [0, 0.5]
    assert len(swept.lines("error: ")) == 4, "none of them stops the others"
    assert rows["sparsity=1 batch_size=1"].startswith("failed sparsity=1: expected 0 <=")
    assert rows["sparsity=0 batch_size=0"].startswith("failed batch_size=0: expected a whole number, 1 or more")
    again = call("-m", *tiny(tmp_path / "out", "sparsity=0,0.5,1", "batch_size=1,0"))
    assert (again.code, again.out.splitlines()[-1]) == (1, "2 skipped, 4 failed")


def test_nothing_is_planned_where_a_point_cannot_be_composed(call: Entry, tmp_path: Path) -> None:
    call("-m", *tiny(tmp_path / "out", "model=random_tiny,foo")).refused("model=foo")
    assert not (tmp_path / "out").exists()


def group_of(output_dir: Path) -> set[str]:
    return {read_record(folder)["config"]["wandb"]["group"] for folder in run_folders(output_dir)}


def test_the_runs_of_a_sweep_are_one_group(call: Entry, tmp_path: Path) -> None:
    call("-m", *tiny(tmp_path / "first", "sparsity=0,0.5", "seed=0,1", rows=1, tokens=1))
    call("-m", *tiny(tmp_path / "second", "seed=0,1", "sparsity=0,0.5", "launcher=local", rows=1, tokens=1))
    call("-m", *tiny(tmp_path / "third", "sparsity=0,0.25", "seed=0,1", rows=1, tokens=1))
    call("-m", *tiny(tmp_path / "named", "sparsity=0,0.5", "wandb.group=mine", rows=1, tokens=1))
    (first,), (second,), (third,) = (group_of(tmp_path / name) for name in ("first", "second", "third"))
    assert first.startswith("sparsity-seed-")
    assert second.rpartition("-")[2] == first.rpartition("-")[2], "the same sweep, wherever it runs"
    assert third != first
    assert group_of(tmp_path / "named") == {"mine"}
    options = ["experiment=paper_lengths", "limit=1", "grid.sparsity=[0]", "seed=0,1"]
    assert call("-m", *tiny(tmp_path / "preset", *options, task="perplexity")).code == 0
    assert group_of(tmp_path / "preset") == {"paper_lengths"}


def test_another_launcher_may_mean_another_device(tmp_path: Path) -> None:
    entry = ManifestEntry(composed(*tiny(tmp_path / "out")))
    entry.plan("seed=0", "local")
    folder = RunFolder(tmp_path / "out", "a-run")
    folder.start({})
    entry.note(runs=["a-run"])
    assert entry.finished_before("local") == []
    folder.finish("cpu")
    assert [run.folder for run in entry.finished_before("local")] == [folder.path]
    assert entry.finished_before("slurm_gpu") == []
    entry.plan("seed=0", "slurm_gpu")
    (status,) = entry.died("SLURM job 3 ended without a result")
    assert (status.state, status.folder) == (FAILED, None), "what another device made is not this point's"


def test_points_are_written_down_for_reading_before_the_first_one_runs(
    call: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    read = generation.read

    def counted(config: object) -> object:
        seen.append(len(list((tmp_path / "out" / ".sweep").iterdir())))
        return read(config)

    monkeypatch.setattr("pipelines.tasks.generation.read", counted)
    assert call("-m", *tiny(tmp_path / "out", "grid.sparsity=[0,0.5]", "seed=0,1")).code == 0
    assert seen == [2, 2]
    notes = [json.loads(path.read_text()) for path in (tmp_path / "out" / ".sweep").iterdir()]
    assert [note["methods"] for note in notes] == [["dense", "griffin 50%"]] * 2
    folders = [path.name for path in run_folders(tmp_path / "out")]
    assert {run for note in notes for run in note["runs"]} == {*folders}
    assert [(row.run, row.state) for row in status.read(tmp_path / "out")] == [(name, "done") for name in folders]


def test_a_model_is_gone_before_the_next_one_is_loaded(
    call: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Any]] = []
    alive: list[int] = []
    load = models.load

    def noted(*arguments: Any, **options: Any) -> models.LoadedModel:
        alive.append(sum(model() is not None for model in loaded))
        found = load(*arguments, **options)
        loaded.append(weakref.ref(found.model))
        return found

    monkeypatch.setattr(models, "load", noted)
    sweep = ["model.architecture.num_hidden_layers=1,2", "grid.sparsity=[0,0.5]"]
    assert call("-m", *tiny(tmp_path / "out", *sweep, rows=1, tokens=2)).code == 0
    assert alive == [0, 0]


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="which worker to kill is read from /proc/locks")
def test_joblib_survives_a_killed_worker(tmp_path: Path) -> None:
    out = tmp_path / "out"
    sweep = command(*tiny(out, "sparsity=0,0.5", "launcher=joblib", rows=6, tokens=60))
    with forked.running(sweep, tmp_path) as calling:
        worker = next(iter(forked.wait_until(lambda: forked.writers(out), calling)))
        assert worker != calling.pid, "joblib's points run in other processes"
        os.kill(worker, signal.SIGKILL)
        printed, told = calling.communicate(timeout=240)
    assert calling.returncode == 0, told
    assert "a worker died; going on with one point at a time" in told
    assert "Traceback" not in told
    assert "2 finished" in printed
    for folder in run_folders(out):
        assert [sample["index"] for sample in read_samples(folder)] == list(range(6))
