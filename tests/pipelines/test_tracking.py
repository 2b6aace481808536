"""Weights & Biases, with its real client and no server: what it is told, where it writes, and how it fails."""

import json
import math
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from calling import Outcome, command, process, read_record, read_samples, run_folders, tiny

from pipelines.config import WandbConfig
from pipelines.tracking import track

WANDB = Path(sys.executable).with_name("wandb")
SECRETS = {"HF_TOKEN": "hf_secret7261", "WANDB_API_KEY": "7261" * 10}
UNREACHABLE = "http://127.0.0.1:9"


@dataclass(frozen=True)
class Tracked:
    """A sweep of two grids of two; the last method fails, on a model that only runs dense."""

    ended: Outcome
    root: Path
    home: Path
    done: list[Path]
    pruned: Path
    failed: Path


def homes(home: Path) -> dict[str, str]:
    """Everything by which wandb could find a home, so that whatever it wrote there would be seen."""
    home.mkdir()
    names = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME")
    own = ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR")
    return {name: str(home / name.lower()) for name in (*names, *own)} | {"HOME": str(home)}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    root = tmp_path_factory.mktemp("tracked")
    people = dict.fromkeys(("USER", "LOGNAME", "USERNAME", "LNAME"), "person7261") | {"HOSTNAME": "machine7261"}
    overrides = tiny(root / "out", "wandb.mode=offline", "tags=[night,tiny]", "grid.sparsity=[0,0.5]", rows=2)
    overrides.append("model.architecture.model_type=llama,mixtral")
    variables = homes(root / "home") | SECRETS | people
    script = (
        "import platform, socket; platform.node = socket.gethostname = lambda: 'machine7261'\n"
        "from pipelines import run; run.main()"
    )
    sweep = [sys.executable, "-c", script, "-m", *overrides]
    ended = process(sweep, root, **variables)
    folders = run_folders(root / "out")
    done = [folder for folder in folders if (folder / "record.json").exists()]
    (failed,) = {*folders} - {*done}
    pruned = next(folder for folder in done if "griffin-50" in folder.name)
    return Tracked(ended, root, root / "home", done, pruned, failed)


def offline_run(folder: Path) -> Path:
    """The one offline run below a run folder."""
    (found,) = (folder / "wandb").glob("offline-run-*")
    return found


def inspect(folder: Path, *options: str) -> str:
    """What wandb's own reader finds in the transaction log."""
    arguments = [WANDB, "leet", "inspect", *options, "--json", offline_run(folder)]
    return subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=60).stdout


def summary_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads(inspect(folder, "--summary")))


def entries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in inspect(folder).splitlines()]


def values_of(key: str, value: Any) -> list[Any]:
    """Everything stored under a key, however deep."""
    if isinstance(value, dict):
        return [*([value[key]] if key in value else []), *(x for v in value.values() for x in values_of(key, v))]
    return [x for v in value for x in values_of(key, v)] if isinstance(value, list) else []


def test_the_run_is_named_and_sorted_as_ours_and_a_view_of_the_record(tracked: Tracked) -> None:
    (run,) = [entry["run"] for entry in entries(tracked.pruned) if entry["type"] == "run"]
    name, _, drawn = run["run_id"].rpartition("-")
    assert (name, len(drawn)) == (tracked.pruned.name, 8)
    assert run["run_group"].startswith("model_type-"), "a sweep is one group, named by what it sweeps"
    assert (run["job_type"], run["project"]) == ("generation", "griffin")
    assert (run["display_name"], sorted(run["tags"])) == ("briefs random_tiny griffin 50%", ["night", "tiny"])
    record, found = read_record(tracked.pruned), summary_of(tracked.pruned)
    assert found["config"] == record["config"], "nested"
    for name, value in (record["metrics"] | record["timing"]).items():
        assert math.isclose(found["summary"][name], value, rel_tol=1e-9), name
    # In W&B one key is one thing: a number of its name would hide the table.
    assert values_of("_type", found["summary"]) == ["table-file"]


def test_samples_are_logged_as_they_come_and_as_a_table(tracked: Tracked) -> None:
    items = [entry["history"]["item"] for entry in entries(tracked.pruned) if entry["type"] == "history"]
    samples = read_samples(tracked.pruned)
    scores = [sample["rouge1"] for sample in samples]
    logged = [(item["samples_done"], item["rouge1"]) for item in items if "samples_done" in item]
    assert logged == [(1, pytest.approx(scores[0])), (2, pytest.approx(sum(scores) / 2))]
    (table,) = offline_run(tracked.pruned).rglob("*.table.json")
    content = json.loads(table.read_text(encoding="utf-8"))
    assert content["columns"] == [key for key in samples[0] if key != "prompt"]
    assert [row[content["columns"].index("text")] for row in content["data"]] == [sample["text"] for sample in samples]


def test_nothing_is_written_but_run_folders_and_each_has_what_it_will_upload(tracked: Tracked) -> None:
    assert list(tracked.home.iterdir()) == []
    assert sorted(path.name for path in tracked.root.iterdir()) == ["articles.jsonl", "home", "out"]
    folders = {folder.name for folder in (*tracked.done, tracked.failed)}
    assert {path.name for path in (tracked.root / "out").iterdir()} == {*folders, ".sweep", "multirun.yaml"}
    # Run folders are moved, archived and synced one by one; the runs of a grid are open side by side.
    assert len(tracked.done) == 3
    for folder in tracked.done:
        assert folder.name in offline_run(folder).name
        files = [path for entry in entries(folder) for path in values_of("local_path", entry)]
        assert files, "the table of samples is a file"
        assert [path for path in files if not Path(path).is_relative_to(folder)] == []


def test_nothing_tells_the_machine_the_user_or_a_secret(tracked: Tracked) -> None:
    # wandb would keep the paths of the program and the interpreter, which lie in somebody's home, and disk and CPU.
    found = entries(tracked.pruned)
    assert {entry["type"] for entry in found}.isdisjoint({"environment", "stats"})
    assert [value for entry in found for value in values_of("host", entry) if value] == []
    files = [path for path in (tracked.root / "out").rglob("*") if path.is_file() and not path.is_symlink()]
    assert {"multirun.yaml", "record.json"} <= {path.name for path in files}
    host = socket.gethostname()  # as wandb's own process sees it; a short one may be chance
    for word in (*SECRETS.values(), "person7261", "machine7261", *([host] if len(host) >= 6 else [])):
        assert [str(path) for path in files if word.encode() in path.read_bytes()] == []


def test_a_failing_method_closes_its_run_as_failed_and_no_other(tracked: Tracked) -> None:
    assert tracked.ended.code == 1
    assert len(tracked.ended.lines("error: ")) == 1
    failed = summary_of(tracked.failed)
    assert (failed["state"], failed["exit_code"]) == ("failed", 1)
    assert [summary_of(folder)["state"] for folder in tracked.done] == ["finished"] * 3


def test_an_unreachable_server_costs_one_warning(tmp_path: Path) -> None:
    ended = process(
        command(*tiny(tmp_path / "out", "wandb.mode=online", "grid.sparsity=[0,0.5]", tokens=2)),
        tmp_path,
        **homes(tmp_path / "home"),
        WANDB_BASE_URL=UNREACHABLE,
        WANDB_API_KEY="7261" * 10,
    )
    assert ended.code == 0
    (warning,) = ended.lines("warning:")  # one for the call, however many runs it has
    assert UNREACHABLE in warning
    assert "python -m pipelines.sync" in warning
    assert "Traceback" not in ended.err
    folders = run_folders(tmp_path / "out")
    assert [read_record(folder)["status"] for folder in folders] == ["finished"] * 2
    assert [summary_of(folder)["summary"]["samples_done"] for folder in folders] == [3, 3]
    assert list((tmp_path / "home").iterdir()) == []


def test_the_same_run_in_two_places_is_two_runs_in_one_project(tmp_path: Path) -> None:
    ids = set()
    for name in ("mine", "theirs", "mine"):  # which goes on
        with track(WandbConfig(mode="offline"), tmp_path / name, "a-run", name="a run", config={}):
            pass
        for path in (tmp_path / name / "wandb").glob("offline-run-*"):
            ids.add(path.name.partition("-a-run-")[2][:8])  # wandb numbers runs of one second
    assert len(ids) == 2
