"""Which methods a call compares, and which runs are the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from calling import composed, write_rows

from pipelines import description
from pipelines.methods import Method, described, evaluation, identity, methods, run_config

BASE = ["model=random_tiny", "limit=3"]


def points(*overrides: str) -> list[tuple[str, Any]]:
    return [(method.statistic, method.sparsity) for method in methods(composed(*BASE, *overrides))]


def only_identity(*overrides: str, device: str = "cpu") -> dict[str, Any]:
    config = composed(*BASE, *overrides)
    (method,) = methods(config)
    return identity(config, method, device)


def only_evaluation(*overrides: str) -> dict[str, Any]:
    config = composed(*BASE, *overrides)
    (method,) = methods(config)
    return evaluation(config, method, "a device")


def test_without_a_grid_there_is_the_roots_one_method() -> None:
    assert points("statistic=wanda", "sparsity=0.25") == [("wanda", 0.25)]


def test_a_grid_is_every_statistic_with_every_sparsity() -> None:
    assert points("grid.statistic=[griffin,wanda]", "grid.sparsity=[0.5,0.75]") == [
        ("griffin", 0.5),
        ("griffin", 0.75),
        ("wanda", 0.5),
        ("wanda", 0.75),
    ]


def test_half_a_grid_takes_the_other_half_from_the_root() -> None:
    assert points("grid.statistic=[griffin,wanda]", "sparsity=0.3") == [("griffin", 0.3), ("wanda", 0.3)]
    assert points("grid.sparsity=[0.3,0.6]", "statistic=wanda") == [("wanda", 0.3), ("wanda", 0.6)]


def test_a_grid_has_compensations_and_budgets_too() -> None:
    config = composed(*BASE, "grid.compensation=[none,ridge]", "grid.budget=[uniform,late]", "statistic=joint")
    assert [(method.statistic, method.compensation, method.budget) for method in methods(config)] == [
        ("joint", compensation, budget) for compensation in ("none", "ridge") for budget in ("uniform", "late")
    ]


def test_a_grid_leaves_out_what_cannot_learn() -> None:
    config = composed(*BASE, "grid.compensation=[none,ridge]", "grid.refresh=[none,experts,compensation]")
    assert [(method.compensation, method.refresh) for method in methods(config)] == [
        ("none", "none"),
        ("none", "experts"),
        ("ridge", "none"),
        ("ridge", "experts"),
        ("ridge", "compensation"),
    ]


def test_a_grid_verifies_what_is_pruned_and_leaves_the_rest_at_its_defaults() -> None:
    drafting = ["draft_tokens=3", "draft_vocabulary=full", "verification_threshold=0.3"]
    grid = ["grid.verification=[none,exact,threshold]", "grid.sparsity=[0,0.5]"]
    found = methods(composed(*BASE, *grid, *drafting))
    assert found[:2] == [Method(sparsity=0), Method()]
    rest = {"draft_tokens": 3, "draft_vocabulary": "full", "verification_threshold": 0.3}
    assert found[2:] == [Method(verification="exact", **rest), Method(verification="threshold", **rest)]


@pytest.mark.parametrize("override", ["draft_tokens=3", "draft_vocabulary=full", "verification_threshold=0.3"])
def test_how_drafts_are_made_counts_where_there_are_drafts(override: str) -> None:
    assert only_identity(override) == only_identity()
    counts = not override.startswith("verification_threshold")
    exact, threshold = "verification=exact", "verification=threshold"
    assert (only_identity(exact, override) != only_identity(exact)) == counts
    assert only_identity(threshold, override) != only_identity(threshold)
    assert only_evaluation(exact, override) == only_evaluation()


def test_runs_from_before_compensation_existed_are_the_same_runs() -> None:
    # The identity of this call when statistic, selection and sparsity were all that a method had.
    known = only_identity()
    assert not {"compensation", "budget", "refresh", "verification", "draft_tokens", "offset"} & set(known)


def test_the_dense_run_is_one_and_comes_first() -> None:
    assert [sparsity for _, sparsity in points("grid.statistic=[griffin,wanda]", "grid.sparsity=[0.5,0]")] == [
        0,
        0.5,
        0.5,
    ]


def test_points_named_twice_are_run_once() -> None:
    assert points("grid.statistic=[griffin,griffin]", "grid.sparsity=[0.5,0.50]") == [("griffin", 0.5)]


@pytest.mark.parametrize(
    ("method", "label"),
    [
        (Method("joint", "topk", 0.7, "ridge", "late", "compensation"), "joint+ridge late refresh=compensation 70%"),
        (Method("griffin", "topk", 0.5), "griffin 50%"),
        (Method("wanda", "topk", 0.125), "wanda 12.5%"),
        (Method("griffin", "topk_sample", 0.75), "griffin topk_sample 75%"),
        (Method("griffin", "topk", (0.5, 0.25)), "griffin per layer"),
        (Method("griffin", "topk", 0.5, "ridge"), "griffin+ridge 50%"),
        (Method("griffin", "topk", 0.5, budget="late"), "griffin late 50%"),
        (Method("joint", "sample", 0.5, "ridge", "late"), "joint+ridge sample late 50%"),
        (Method("joint", "topk", 0.5, "ridge", refresh="experts"), "joint+ridge refresh=experts 50%"),
        (Method("griffin", "sample", 0.0), "dense"),
        (Method("griffin", "topk", (0.0, 0.0)), "dense"),
    ],
)
def test_labels_are_the_method_in_words(method: Method, label: str) -> None:
    assert method.label == label


def test_a_methods_words_are_made_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Method, "family", property(lambda method: "other words"))
    config = composed(*BASE)
    (method,) = methods(config)
    assert method.label == "other words 50%"
    entry = described(config, method)
    assert (entry["family"], entry["label"]) == ("other words", method.label)
    shared = description.method_entry(run_config(config, method) | {"shared_experts": True}, "a b 5%", "a b")
    assert (shared["family"], shared["label"]) == ("a b shared", "a b shared 5%")


def test_a_record_says_its_method_in_words_and_settings() -> None:
    config = composed(*BASE, "statistic=joint", "compensation=ridge", "shared_experts=true", "grid.sparsity=[0,0.7]")
    dense, pruned = (described(config, method) for method in methods(config))
    assert dense == {"label": "dense", "family": "dense", "sparsity": 0.0}
    assert [method.family for method in methods(config)] == ["dense", "joint+ridge"]
    assert pruned == {
        "label": "joint+ridge shared 70%",
        "family": "joint+ridge shared",
        "statistic": "joint",
        "selection": "topk",
        "compensation": "ridge",
        "budget": "uniform",
        "refresh": "none",
        "sparsity": 0.7,
        "mode": "compact",
        "shared_experts": True,
        "verification": "none",
        "draft_tokens": "auto",
        "draft_vocabulary": "prompt",
        "prompt_lookup": False,
        "verification_threshold": 0.1,
    }


@pytest.mark.parametrize("override", ["statistic=wanda", "compensation=ridge", "mode=masked", "shared_experts=true"])
def test_the_method_and_what_changes_no_result_are_no_part_of_the_evaluation(override: str) -> None:
    assert only_evaluation(override) == only_evaluation("output_dir=elsewhere", "offload_dense=true", "sparsity=0")


def test_an_evaluation_is_flat_and_has_the_data_by_its_content() -> None:
    found = only_evaluation("offset=1")
    assert {type(value) for value in found.values()} <= {str, int, float, bool, list, type(None)}
    assert (found["model.name"], found["task.name"], found["offset"], found["limit"]) == ("random_tiny", "briefs", 1, 3)
    assert found["device"] == "a device"
    assert found["task.embedded"].startswith("sha256:")
    assert only_evaluation("task.shots=0")["task.embedded_shots"] is None, "no shots are read"


def test_times_are_of_one_machine_and_of_one_way_to_multiply() -> None:
    keys = {*only_evaluation("task=latency")} - {*only_evaluation("task=flocking")}
    assert {"platform", "cpus", "offload_dense", "cpu_onednn"} <= keys
    both = [only_identity("task=latency", f"cpu_onednn={value}") for value in ("true", "false")]
    assert both[0] != both[1]
    assert "cpu_onednn" not in both[1], "runs from before the key multiplied plainly"


@pytest.mark.parametrize(
    "override",
    [
        "output_dir=elsewhere",
        "tags=[mine]",
        "wandb.mode=disabled",
        "wandb.project=other",
        "wandb.group=night",
        "model.licence_gate=https://example.org",
        "device=cpu",  # what auto stands for
        "mode=compact",  # what auto stands for
        "offload_dense=true",
        "cpu_onednn=false",
        "sparsity=0.50",
        "grid.sparsity=[0.5]",
        "grid.statistic=[griffin]",
    ],
)
def test_what_changes_no_result_changes_no_identity(override: str) -> None:
    assert only_identity(override) == only_identity()


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "limit=4",
        "batch_size=2",
        "batch_size=auto",
        "shared_experts=true",
        "mode=masked",
        "sparsity=0.25",
        "sparsity=[0.5,0.5,0.5]",
        "statistic=wanda",
        "compensation=ridge",
        "budget=late",
        "refresh=experts",
        "verification=exact",
        "offset=1",
        "selection=sample",
        "model.dtype=bfloat16",
        "model.add_bos_token=true",
        "model.revision=v2",
        "model.architecture.hidden_size=128",
        "task.max_new_tokens=7",
        "task.shots=0",
        "task.stop=END",
        "task.instruction=Shorter",
        "task.decoding=reference_sampling",
    ],
)
def test_what_changes_the_result_changes_the_identity(override: str) -> None:
    assert only_identity(override) != only_identity()


def test_the_device_is_part_of_the_identity() -> None:
    assert only_identity(device="cuda") != only_identity(device="cpu")


@pytest.mark.parametrize(
    "override",
    [
        *("statistic=wanda", "selection=sample", "compensation=ridge", "budget=late", "refresh=experts", "mode=masked"),
        *("shared_experts=true", "sparsity=[0,0,0]", "sparsity=0.0"),
    ],
)
def test_a_dense_run_has_no_method(override: str) -> None:
    assert only_identity("sparsity=0", override) == only_identity("sparsity=0")


@pytest.mark.parametrize("override", ["seed=1", "batch_size=2", "task.max_new_tokens=7", "model.dtype=bfloat16"])
def test_a_dense_run_has_everything_else(override: str) -> None:
    assert only_identity("sparsity=0", override) != only_identity("sparsity=0")


def test_a_grids_point_is_the_same_run_as_a_call_for_it_alone() -> None:
    grid = composed(*BASE, "grid.statistic=[griffin,wanda]", "grid.sparsity=[0,0.5]")
    alone = [["sparsity=0"], ["statistic=griffin", "sparsity=0.5"], ["statistic=wanda", "sparsity=0.5"]]
    assert [identity(grid, method, "cpu") for method in methods(grid)] == [only_identity(*one) for one in alone]


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


def test_identities_hold_plain_values_only() -> None:
    def leaves(value: Any) -> list[Any]:
        if isinstance(value, dict):
            return [leaf for inner in value.values() for leaf in leaves(inner)]
        return [leaf for inner in value for leaf in leaves(inner)] if isinstance(value, list) else [value]

    found = {type(leaf) for leaf in leaves(only_identity("task=xsum", "sparsity=[0.1,0.2,0.3]"))}
    assert found <= {str, int, float, bool, type(None)}


def test_a_runs_configuration_has_its_own_method_and_no_grid() -> None:
    config = composed(*BASE, "grid.statistic=[wanda]", "grid.sparsity=[0.25]")
    (method,) = methods(config)
    plain = run_config(config, method)
    assert (plain["statistic"], plain["sparsity"]) == ("wanda", 0.25)
    assert "grid" not in plain
    assert config.statistic == "griffin", "the call's own configuration is left as it was"


def test_a_grid_leaves_out_what_tokens_that_choose_for_themselves_cannot_have() -> None:
    grid = ["grid.statistic=[griffin,teal]", "grid.compensation=[none,ridge]", "grid.sparsity=[0,0.5]"]
    config = composed(*BASE, *grid)
    found = methods(config)
    assert [(method.statistic, method.compensation) for method in found[1:]] == [
        ("griffin", "none"),
        ("griffin", "ridge"),
        ("teal", "none"),
    ]
    assert [run_config(config, method)["mode"] for method in found] == ["compact", "compact", "compact", "masked"]
