"""Run folders: their names, one writer each, samples that survive a crash; what a record says and comes from."""

import errno
import json
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from calling import (
    REPOSITORY,
    Entry,
    command,
    composed,
    cut_off,
    process,
    ran,
    read_record,
    run_folder,
    saved_model,
    tiny,
)

from analysis.runs import read_run_folders
from pipelines import status
from pipelines.errors import UserError
from pipelines.methods import identity
from pipelines.run_folder import RunFolder, run_id
from pipelines.summary import tables

SAFE = re.compile(r"[A-Za-z0-9_.-]{1,128}")  # in W&B ids and in folders of every file system
SAMPLES = [{"index": 0, "text": "one\u2028still one"}, {"index": 1, "text": "two"}, {"index": 2, "text": "drei \u20ac"}]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run that was cut off after three samples."""
    folder = RunFolder(tmp_path, "a-run")
    folder.start({"seed": 0})
    folder.append(SAMPLES[:2])
    folder.append(SAMPLES[2:])
    return folder


def test_the_order_of_an_identity_does_not_matter_to_its_run_id() -> None:
    one, other = {"a": {"b": 1}, "c": None}, {"c": None, "a": {"b": 1}}
    assert run_id("words", one) == run_id("words", other) != run_id("words", one | {"c": "None"})


@pytest.mark.parametrize("name", ["owner/name", "../../up", "a b: c", "long" * 60])
def test_run_ids_are_safe_and_readable_whatever_the_names(name: str, tmp_path: Path) -> None:
    # Another hub model needs no file, only a name in the call, so the name may be anything.
    folders = ran(*tiny(tmp_path / "out", f"model.name='{name}'", "grid.sparsity=[0,0.125]", rows=1, tokens=1))
    for folder, method in zip(folders, ("-dense", "-griffin-12.5"), strict=True):
        assert folder.parent == tmp_path / "out"
        assert SAFE.fullmatch(folder.name)
        assert folder.name == read_record(folder)["run_id"]
        assert folder.name.startswith("briefs-")
        assert folder.name.rpartition("-")[0].endswith(method) or len(name) > 100


@pytest.mark.parametrize(
    "garbage",
    [
        *(b"not JSON\n", b"\xff\xfe\n", b'{"index": 1\n', b"\x00\x00\x00\n", b"\n", b"null\n", b"7\n"),
        *(b'{"index": 0, "text": "again"}\n', b'{"index": "1"}\n', b'{"text": "two"}\n'),
    ],
)
def test_from_a_damaged_line_on_samples_are_cut_off(garbage: bytes, folder: RunFolder) -> None:
    # A file system may bring back blocks of zeros after a crash; what follows them cannot be trusted either.
    path = folder.path / "samples.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + garbage + lines[1] + lines[2])
    assert folder.samples() == SAMPLES[:1]
    assert path.read_bytes() == lines[0]


def test_of_samples_that_were_cut_off_at_any_byte_the_whole_ones_stay(folder: RunFolder) -> None:
    path = folder.path / "samples.jsonl"
    content = path.read_bytes()
    for size in range(len(content), -1, -1):
        path.write_bytes(content[:size])
        assert folder.samples() == SAMPLES[: content[:size].count(b"\n")]
        assert content.startswith(path.read_bytes())


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"PK")])
def test_a_sample_without_its_arrays_is_none(damage: Callable[[Path], object], folder: RunFolder) -> None:
    folder.append([{"index": index, "arrays": {"scores": np.ones(3)}} for index in (3, 4)])
    assert len(folder.samples()) == 5
    damage(folder.path / "arrays" / "4.npz")
    assert [sample["index"] for sample in folder.samples()] == [0, 1, 2, 3]


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's files need root")
def test_a_folder_of_another_user_is_held_only_by_a_process() -> None:
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        folder = RunFolder(Path(root), "a-run")
        held = []
        for claimed in (True, False):
            if claimed:
                assert folder.claim()
            else:
                folder.release()
            os.seteuid(65534)
            try:
                held.append(RunFolder(Path(root), "a-run").held())
            finally:
                os.seteuid(0)
    assert held == [True, False]


def test_a_file_system_without_locks_is_refused(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", missing)
    with pytest.raises(UserError, match="has no file locks"):
        folder.claim()


def test_a_run_that_goes_on_keeps_its_state_and_forgets_its_failure(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "a-run")
    assert (folder.samples(), folder.record(), list(tmp_path.iterdir())) == ([], None, [])
    folder.start({"seed": 0}, 3, ["a-run", "b-run"])
    folder.start({"seed": 0}, 3, ["a-run", "c-run"])
    assert folder.state()["beside"] == ["a-run", "c-run"], "nothing had been written"
    folder.append(SAMPLES[:1])
    folder.fail("out of memory")
    started = folder.state()["started"]
    assert folder.state()["failed"] == "out of memory"
    folder.start({"seed": 0}, 3, ["a-run"])
    expected = {"samples": 3, "failed": None, "beside": ["a-run", "c-run"], "versions": [], "started": started}
    assert folder.state() == expected


def test_a_record_makes_a_run_finished(folder: RunFolder) -> None:
    assert folder.record() is None
    (folder.path / ".config.yaml.1a2b3c4d.tmp").write_text("seed")  # of a process that was killed
    folder.start({"seed": 0})
    method = {"label": "caf\u00e9"}
    written = folder.finish("cpu", config={"seed": 0}, metrics={"rouge1": 1.5}, timing={}, method=method)
    assert folder.record() == written
    parts = {"run_id", "status", "method", "evaluation", "config", "metrics", "timing", "environment", "digests"}
    assert set(written) == parts
    assert (written["run_id"], written["status"], written["method"]) == ("a-run", "finished", method)
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.yaml", "record.json", "samples.jsonl"]
    text = (folder.path / "record.json").read_text(encoding="utf-8")
    assert "caf\u00e9" in text, "for reading"
    assert json.dumps(json.loads(text), indent=2, ensure_ascii=False) + "\n" == text


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_no_finite_number_is_a_result(broken: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.functional.cross_entropy", lambda *_, **__: torch.tensor([1.0, broken]))
    (folder,) = ran(*tiny(tmp_path / "out", "limit=2", task="perplexity"))
    for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        assert json.loads(line, parse_constant=pytest.fail)["nll"] == {"p12_g9": {"float": str(broken)}}
    json.loads((folder / "record.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    (record,) = read_run_folders([tmp_path / "out"]).records
    assert str(record["metrics"]["perplexity"]) == str(broken)
    assert math.isnan(record["metrics"]["perplexity_stderr"])
    assert f"{broken:.2f}" in "".join(tables([("dense", record)]))
    (row,) = status.read(tmp_path / "out")
    assert row.state == status.DONE


def test_a_record_says_when_it_ran_on_what_and_by_which_code(tmp_path: Path) -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)
    (folder,) = ran(*tiny(tmp_path / "out"))
    record = read_record(folder)
    for values in (record["metrics"], record["timing"]):
        assert values
        assert all(type(value) in (int, float) and math.isfinite(value) for value in values.values())
    assert {"rouge1", "rouge2", "rougeL", "samples", "skipped_prompts"} < set(record["metrics"])
    found = record["environment"]
    assert all(found[name] for name in ("python", "torch", "transformers", "rouge-score", "griffin-pruning", "device"))
    started, finished = (
        datetime.strptime(found[key], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC) for key in ("started", "finished")
    )
    assert before <= started <= finished <= datetime.now(UTC)
    assert record["timing"]["duration_seconds"] >= record["timing"]["seconds"] > 0
    assert found["processor"]
    assert found["cpus"] == os.cpu_count()
    assert found["memory_bytes"] > 2**28
    checkout = subprocess.run(["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"], capture_output=True, text=True)
    if checkout.returncode == 0:
        assert found["git_commit"] == checkout.stdout.strip()
        assert found["git_clean"] in (True, False)


def test_a_resumed_run_tells_what_else_it_comes_from(tmp_path: Path) -> None:
    # The hub's own cache, without the hub.
    cache = tmp_path / "hub" / "models--owner--name"
    first, second = cache / "snapshots" / ("a" * 40), cache / "snapshots" / ("b" * 40)
    shutil.copytree(saved_model(first), second)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(first.name)
    overrides = tiny(tmp_path / "out", "model=llama3_8b", "model.dtype=float32", "model.repo=owner/name")
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    ended = process(command(*overrides), tmp_path, **offline)
    assert (ended.code, ended.lines("warning: ")) == (0, [])
    folder = run_folder(tmp_path / "out")
    assert read_record(folder)["environment"]["model_revision"] == first.name
    cut_off(folder, 1)
    earlier = {"git_commit": "an earlier one", "model_revision": first.name}
    (folder / "state.json").write_text(json.dumps({"versions": [earlier], "started": "2026-01-01T00:00:00Z"}))
    (cache / "refs" / "main").write_text(second.name)
    ended = process(command(*overrides), tmp_path, **offline)
    (warning,) = ended.lines("warning: ")
    assert "instead of an earlier one" in warning
    assert f"model_revision {second.name} instead of {first.name}" in warning
    found = read_record(folder)["environment"]
    assert found["model_revision"] == second.name
    assert found["earlier_versions"] == [earlier]
    assert found["started"] == "2026-01-01T00:00:00Z", "when it first began"
    record = (folder / "record.json").read_text()  # contradicted by its samples, from which it is made again
    changed = record.replace(found["torch"], "0.0").replace('"rouge1": ', '"rouge1": 1')
    (folder / "record.json").write_text(changed)
    ended = process(command(*overrides), tmp_path, **offline)
    assert "torch " + found["torch"] + " instead of 0.0" in ended.lines("warning: ")[0]


def test_a_models_folder_counts_by_its_content(tmp_path: Path) -> None:
    def named(folder: Path) -> str:
        config = composed("model=llama3_8b", f"model.repo={folder}")
        return run_id("", identity(config, config.methods()[0], "cpu"))

    one = saved_model(tmp_path / "one")
    (one / "README.md").touch()  # which loading passes over
    other = shutil.copytree(one, tmp_path / "other")
    (other / "README.md").write_text("A model.")
    assert named(one) == named(other)
    content = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert named(one) != named(other)


def test_idle_keys_are_told_and_tags_can_be_added_later(call: Entry, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = call(*tiny(out, "tags=[first]", "sparsity=0", "statistic=wanda"))
    assert first.lines("note: ") == ["note: statistic=wanda changes nothing in this call"]
    record = read_record(run_folder(out))
    ended = call(*tiny(out, "tags=[first,paper]", "sparsity=0"))
    assert "finished before, skipped; tags added: paper" in ended.err
    changed = read_record(run_folder(out))
    assert changed["config"]["tags"] == ["first", "paper"]
    assert changed["metrics"] == record["metrics"]
    again = call(*tiny(out, "tags=[paper]", "sparsity=0"))
    assert "tags added" not in again.err
