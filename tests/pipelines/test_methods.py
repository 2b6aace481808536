"""Which methods a call compares, and which runs are the same run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from calling import composed, write_rows
from omegaconf import OmegaConf

from griffin import DENSE, METHODS, Method
from pipelines.composition import CONF
from pipelines.method_keys import AXES
from pipelines.methods import described, evaluation, identity, run_config
from pipelines.sweeps import ManifestEntry

BASE = ["model=random_tiny", "limit=3"]
RIDGE = {"compensation": "ridge"}


def only_identity(*overrides: str, device: str = "cpu") -> dict[str, Any]:
    config = composed(*BASE, *overrides)
    (method,) = config.methods()
    return identity(config, method, device)


def only_evaluation(*overrides: str) -> dict[str, Any]:
    config = composed(*BASE, *overrides)
    (method,) = config.methods()
    return evaluation(config, method, "a device")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("statistic=wanda sparsity=0.25", [Method("wanda", sparsity=0.25)]),
        ("sparsity=[0.5,0,0.25]", [Method(sparsity=(0.5, 0, 0.25))]),
        (
            "grid.statistic=[griffin,wanda] grid.sparsity=[0.5,0.75]",
            [Method(name, sparsity=share) for name in ("griffin", "wanda") for share in (0.5, 0.75)],
        ),
        ("grid.sparsity=[0.3,0.6] statistic=wanda", [Method("wanda", sparsity=share) for share in (0.3, 0.6)]),
        (
            "grid.selection=[topk,sample] grid.draft_tokens=[2,4] verification=exact",
            [Method("griffin", s, verification="exact", draft_tokens=k) for s in ("topk", "sample") for k in (2, 4)],
        ),
        (  # what cannot learn is left out
            "grid.compensation=[none,ridge] grid.refresh=[none,compensation]",
            [Method(), Method(**RIDGE), Method(**RIDGE, refresh="compensation")],
        ),
        (  # and what single tokens cannot have
            "grid.statistic=[griffin,teal] grid.compensation=[none,ridge] grid.sparsity=[0,0.5]",
            [DENSE, Method(), Method(**RIDGE), Method("teal")],
        ),
        (  # dense is one and comes first, points named twice are run once
            "grid.statistic=[griffin,griffin,wanda] grid.sparsity=[0.5,0,0.50,0.0]",
            [DENSE, Method(), Method("wanda")],
        ),
        (  # what is not verified, or is dense, has no drafts
            "grid.verification=[none,exact] grid.draft_tokens=[3,4] grid.sparsity=[0,0.5]",
            [DENSE, Method(), *(Method(verification="exact", draft_tokens=k) for k in (3, 4))],
        ),
        ("method=recipe", [METHODS["recipe"]]),
        ("method=recipe verification=exact budget=uniform quantization=int4", [METHODS["exact"]]),
        (
            "method=recipe sparsity=0.7 grid.budget=[uniform]",
            [Method("joint", "topk", 0.7, "ridge", "uniform", "compensation")],
        ),
        (
            "grid.method=[dense,griffin,recipe,exact]",
            [DENSE, *(METHODS[name] for name in ("griffin", "recipe", "exact"))],
        ),
        (  # dense once
            "grid.method=[recipe,dense,magnitude] grid.sparsity=[0,0.5,0.7] selection=sample",
            [
                DENSE,
                *(Method("joint", "sample", share, "ridge", "late", "compensation") for share in (0.5, 0.7)),
                *(Method("magnitude", "sample", share) for share in (0.5, 0.7)),
            ],
        ),
        ("task=flocking statistic=wanda", [DENSE]),
    ],
)  # fmt: skip
def test_a_call_is_every_combination_that_can_be(overrides: str, expected: list[Method]) -> None:
    assert composed(*BASE, *overrides.split()).methods() == expected


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_file_says_what_the_library_says(name: str) -> None:
    assert {path.stem for path in (CONF / "method").glob("*.yaml")} == {*METHODS}
    assert composed(f"method={name}").methods() == [METHODS[name]]
    written = dict(OmegaConf.load(CONF / "method" / f"{name}.yaml"))
    assert not [key for key, value in written.items() if value == AXES[str(key)].default], "only what differs"


def test_a_machine_without_a_gpu_finds_the_points_of_one_with(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = set()
    for gpu in (True, False):
        monkeypatch.setattr("torch.cuda.is_available", lambda gpu=gpu: gpu)
        for task in ("briefs", "latency"):
            paths.add(ManifestEntry(composed("model=random_tiny", f"task={task}")).path)
    assert len(paths) == 2, "one for each task"


def test_a_methods_words_are_made_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Method, "family", property(lambda method: "other words"))
    entry = described(composed(*BASE), Method())
    assert (entry["family"], entry["label"]) == ("other words", "other words 50%")


def test_a_record_says_its_method_in_words_and_settings() -> None:
    config = composed(*BASE, "statistic=joint", "compensation=ridge", "shared_experts=true", "grid.sparsity=[0,0.7]")
    dense, pruned = (described(config, method) for method in config.methods())
    assert dense == {"label": "dense", "family": "dense", "sparsity": 0.0}
    assert [method.family for method in config.methods()] == ["dense", "joint+ridge"]
    settings = asdict(Method("joint", compensation="ridge", sparsity=0.7)) | {"mode": "compact", "shared_experts": True}
    assert pruned == settings | {"label": "joint+ridge shared 70%", "family": "joint+ridge shared"}


@pytest.mark.parametrize(
    "override",
    [
        *("statistic=wanda", "compensation=ridge", "mode=masked", "shared_experts=true"),
        *("verification=exact draft_tokens=3", "verification=threshold verification_threshold=0.3"),
    ],
)
def test_the_method_and_what_changes_no_result_are_no_part_of_the_evaluation(override: str) -> None:
    assert only_evaluation(*override.split()) == only_evaluation(
        "output_dir=elsewhere", "offload_dense=true", "sparsity=0"
    )


def test_an_evaluation_is_flat_and_has_the_data_by_its_content() -> None:
    found = only_evaluation("offset=1")
    assert {type(value) for value in found.values()} <= {str, int, float, bool, list, type(None)}
    assert (found["model.name"], found["task.name"], found["offset"], found["limit"]) == ("random_tiny", "briefs", 1, 3)
    assert found["device"] == "a device"
    assert found["task.embedded"].startswith("sha256:")
    only_of_times = {*only_evaluation("task=latency")} - {*only_evaluation("task=flocking")}
    assert {"platform", "cpus", "offload_dense", "cpu_onednn"} <= only_of_times
    assert only_evaluation("task.shots=0")["task.embedded_shots"] is None, "no shots are read"


# What is called, and what more makes the same run of it.
SAME = {
    "": [
        *("output_dir=elsewhere", "tags=[mine]", "wandb.mode=disabled", "wandb.project=other", "wandb.group=night"),
        *("model.licence_gate=https://example.org", "offload_dense=true", "cpu_onednn=false", "sparsity=0.50"),
        *("device=cpu", "mode=compact"),  # what auto stands for
        *("grid.sparsity=[0.5]", "grid.statistic=[griffin]"),
        *("draft_tokens=3", "draft_vocabulary=full", "verification_threshold=0.3"),  # it has no drafts
    ],
    "sparsity=0": [  # a dense run has no method
        *("statistic=wanda", "selection=sample", "compensation=ridge", "budget=late", "method=recipe sparsity=0"),
        *("mode=masked", "shared_experts=true", "sparsity=[0,0,0]", "sparsity=0.0"),
    ],
    "verification=exact": ["verification_threshold=0.3"],
}
OTHER = {
    "": [
        *("seed=1", "limit=4", "offset=1", "batch_size=2", "batch_size=auto", "shared_experts=true", "mode=masked"),
        *("sparsity=0.25", "sparsity=[0.5,0.5,0.5]", "statistic=wanda", "compensation=ridge", "budget=late"),
        *("method=recipe", "verification=exact", "selection=sample"),
        *("model.dtype=bfloat16", "model.add_bos_token=true", "model.revision=v2"),
        *("model.architecture.hidden_size=128", "task.max_new_tokens=7", "task.shots=0", "task.stop=END"),
        *("task.instruction=Shorter", "task.decoding=reference_sampling"),
    ],
    "sparsity=0": ["seed=1", "batch_size=2", "task.max_new_tokens=7", "model.dtype=bfloat16"],
    "sparsity=0 assistance=prompt_lookup": ["draft_tokens=3"],
    "verification=exact": ["draft_tokens=3", "draft_vocabulary=full"],
    "verification=threshold": ["draft_tokens=3", "draft_vocabulary=full", "verification_threshold=0.3"],
    "task=latency": ["cpu_onednn=false"],
}


@pytest.mark.parametrize(("call", "more"), [(call, more) for call in SAME for more in SAME[call]])
def test_what_changes_no_result_changes_no_identity(call: str, more: str) -> None:
    assert only_identity(*call.split(), *more.split()) == only_identity(*call.split())


@pytest.mark.parametrize(("call", "more"), [(call, more) for call in OTHER for more in OTHER[call]])
def test_what_changes_the_result_changes_the_identity(call: str, more: str) -> None:
    assert only_identity(*call.split(), *more.split()) != only_identity(*call.split())


def test_a_grids_point_is_the_same_run_as_a_call_for_it_alone() -> None:
    grid = composed(*BASE, "grid.statistic=[griffin,wanda]", "grid.sparsity=[0,0.5]")
    alone = [["sparsity=0"], ["statistic=griffin", "sparsity=0.5"], ["statistic=wanda", "sparsity=0.5"]]
    assert [identity(grid, method, "cpu") for method in grid.methods()] == [only_identity(*one) for one in alone]


@pytest.mark.parametrize("key", ["task.data_files", "task.shots_file"])
def test_data_files_count_by_content_and_not_by_place(key: str, tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    row = {"article": "Rain fell.", "summary": "Rain."}
    here = write_rows(tmp_path / "here.jsonl", [row])
    moved = write_rows(tmp_path / "moved" / "there.jsonl", [row])
    other = write_rows(tmp_path / "other.jsonl", [row | {"summary": "Wet."}])
    assert only_identity(f"{key}={here}") == only_identity(f"{key}={moved}")
    assert only_identity(f"{key}={here}") != only_identity(f"{key}={other}")
    assert only_identity(f"{key}={here}") != only_identity()
    points = [ManifestEntry(composed(*BASE, f"{key}={path}")).path for path in (here, moved, other)]
    assert points[0] == points[1] != points[2], "of a sweep, too"


def test_an_identity_holds_plain_values_that_differ_from_the_defaults_and_the_device() -> None:
    found = only_identity("task=xsum", "sparsity=[0.1,0.2,0.3]")
    assert json.loads(json.dumps(found)) == found
    assert {*only_identity()} == {"model", "task", "mode", "limit", "device"}
    more = {"statistic", "compensation", "budget", "refresh"}
    assert {*only_identity("method=recipe")} - {*only_identity()} == more
    assert only_identity(device="cuda") != only_identity(device="cpu")


def test_a_runs_configuration_has_its_own_method_and_no_grid() -> None:
    config = composed(*BASE, "grid.method=[griffin,teal]", "grid.sparsity=[0.25]")
    griffin, teal = (run_config(config, method) for method in config.methods())
    assert (teal["statistic"], teal["sparsity"]) == ("teal", 0.25)
    assert [griffin["mode"], teal["mode"]] == ["compact", "masked"], "single tokens run masked"
    assert "grid" not in griffin
    assert config.statistic == "griffin", "the call's own configuration is left as it was"
