"""What a record says of where it comes from; tags that come later; keys that change nothing."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from calling import REPOSITORY, Outcome, command, composed, cut_off, process, ran, read_record, run_folder, tiny

from pipelines.methods import identity, unused
from pipelines.models import load
from pipelines.run_folder import run_id


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


def saved_model(folder: Path) -> Path:
    """A model's files, with a file that loading passes over."""
    loaded = load(composed("model=random_tiny").model, "cpu", 0)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    (folder / "README.md").touch()
    return folder


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
    other = shutil.copytree(one, tmp_path / "other")
    (other / "README.md").write_text("A model.")
    assert named(one) == named(other)
    with (other / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert named(one) != named(other)


def test_idle_keys_are_told_and_tags_can_be_added_later(call: Callable[..., Outcome], tmp_path: Path) -> None:
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


# What is called -> what more changes nothing about it, and what does.
IDLE = {
    "": ("draft_vocabulary=full", "sparsity=0 statistic=wanda limit=3"),
    "task=flocking": ("sparsity=0.7 method=recipe grid.statistic=[wanda]", "limit=3 offset=3"),
    "task=latency": ("limit=3", ""),
    "sparsity=0": ("statistic=wanda draft_tokens=3", ""),
    "sparsity=0 assistance=prompt_lookup": ("", "draft_tokens=3"),
    "verification=exact": ("verification_threshold=0.3", "draft_vocabulary=full"),
    "verification=threshold": ("", "verification_threshold=0.3"),
    "grid.verification=[exact,none]": ("", "draft_tokens=3"),  # some of the call's methods draft
    "grid.verification=[threshold,exact]": ("", "verification_threshold=0.3"),
    "grid.sparsity=[0.5,0]": ("", "shared_experts=true"),
    "grid.statistic=[griffin]": ("statistic=wanda", ""),  # the grid's are taken
}


@pytest.mark.parametrize(
    ("call", "override", "idle"),
    [(call, more, not which) for call in IDLE for which in (0, 1) for more in IDLE[call][which].split()],
)
def test_keys_that_change_nothing_are_known(call: str, override: str, idle: bool) -> None:
    config = composed("model=random_tiny", *call.split(), override)
    assert unused([override, "output_dir=x"], config) == ([override] if idle else [])
