"""What a record says of where it comes from; tags that come later; keys that change nothing."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from calling import REPOSITORY, Outcome, cut_off, ran, read_record, run_folder, tiny

from pipelines.description import unused


def test_a_record_says_when_it_ran_on_what_and_by_which_code(tmp_path: Path) -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)
    (folder,) = ran(*tiny(tmp_path / "out"))
    record = read_record(folder)
    found = record["environment"]
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
    assert platform.node() not in (folder / "record.json").read_text(encoding="utf-8"), "no host name"


def test_a_run_that_goes_on_began_when_it_first_began(tmp_path: Path) -> None:
    (folder,) = ran(*tiny(tmp_path / "out"))
    cut_off(folder, 1)
    (folder / "state.json").write_text('{"beside": [], "started": "2026-01-01T00:00:00Z"}', encoding="utf-8")
    ran(*tiny(tmp_path / "out"))
    assert read_record(folder)["environment"]["started"] == "2026-01-01T00:00:00Z"


def test_tags_of_a_finished_run_can_be_added_later(call: Callable[..., Outcome], tmp_path: Path) -> None:
    out = tmp_path / "out"
    call(*tiny(out, "tags=[first]"))
    record = read_record(run_folder(out))
    ended = call(*tiny(out, "tags=[first,paper]"))
    assert "finished before, skipped; tags added: paper" in ended.err
    changed = read_record(run_folder(out))
    assert changed["config"]["tags"] == ["first", "paper"]
    assert changed["metrics"] == record["metrics"]
    again = call(*tiny(out, "tags=[paper]"))
    assert "tags added" not in again.err


DENSE = {"task": {"kind": "generation"}, "sparsity": 0, "verification": "none", "assistance": "none"}
PRUNED = DENSE | {"sparsity": 0.5}


@pytest.mark.parametrize(
    ("config", "override", "idle"),
    [
        (DENSE | {"task": {"kind": "flocking"}}, "sparsity=0.7", True),
        (DENSE | {"task": {"kind": "flocking"}}, "grid.statistic=[wanda]", True),
        (DENSE | {"task": {"kind": "flocking"}}, "limit=3", False),
        (DENSE, "statistic=wanda", True),
        (DENSE, "sparsity=0", False),
        (DENSE, "draft_tokens=3", True),
        (DENSE | {"assistance": "prompt_lookup"}, "draft_tokens=3", False),
        (PRUNED, "statistic=wanda", False),
        (PRUNED, "draft_vocabulary=full", True),
        (PRUNED | {"verification": "exact"}, "draft_vocabulary=full", False),
        (PRUNED | {"verification": "exact"}, "verification_threshold=0.3", True),
        (PRUNED | {"verification": "threshold"}, "verification_threshold=0.3", False),
        (PRUNED | {"task": {"kind": "latency"}}, "limit=3", True),
        (PRUNED, "limit=3", False),
    ],
)
def test_keys_that_change_nothing_are_known(config: dict[str, object], override: str, idle: bool) -> None:
    assert unused([override, "output_dir=x"], config) == ([override] if idle else [])


def test_keys_that_change_nothing_are_told(call: Callable[..., Outcome], tmp_path: Path) -> None:
    ended = call(*tiny(tmp_path / "out", "sparsity=0", "statistic=wanda"))
    assert ended.lines("note: ") == ["note: statistic=wanda changes nothing in this call"]
    assert ended.code == 0
