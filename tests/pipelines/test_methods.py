"""Which methods a call compares, and which runs are the same run."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from calling import composed, write_rows
from omegaconf import OmegaConf

from griffin import DENSE, METHODS, Method
from pipelines.composition import CONF
from pipelines.config import RunConfig
from pipelines.method_keys import AXES
from pipelines.methods import described, evaluation, identity, run_config, unused
from pipelines.sweeps import ManifestEntry

BASE = ["model=random_tiny", "limit=3"]
RIDGE = {"compensation": "ridge"}


def only_identity(*overrides: str, device: str = "cpu") -> dict[str, Any]:
    config = composed(*BASE, *overrides)
    (method,) = config.methods()
    return identity(config, method, device)


def only_evaluation(config: RunConfig) -> dict[str, Any]:
    """That of all methods of a call."""
    found = [evaluation(config, method, "a device") for method in config.methods()]
    assert found == found[:1] * len(found)
    return found[0]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("statistic=wanda sparsity=0.25", [Method("wanda", sparsity=0.25)]),
        ("sparsity=[0.5,0,0.25]", [Method(sparsity=(0.5, 0, 0.25))]),
        ("grid.sparsity=[0.3,0.6] statistic=wanda", [Method("wanda", sparsity=share) for share in (0.3, 0.6)]),
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
        ("statistic=impact verification=exact quantization=int4", [METHODS["exact"]]),
        (
            "method=recipe sparsity=0.7 grid.budget=[uniform]",
            [Method("joint", "topk", 0.7, "ridge", "uniform", "compensation")],
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


def test_an_evaluation_is_flat_and_has_the_data_by_its_content() -> None:
    found = only_evaluation(composed(*BASE, "offset=1"))
    assert {type(value) for value in found.values()} <= {str, int, float, bool, list, type(None)}
    assert (found["model.name"], found["task.name"], found["offset"], found["limit"]) == ("random_tiny", "briefs", 1, 3)
    assert found["device"] == "a device"
    assert found["task.embedded"].startswith("sha256:")
    timed, other = ({*only_evaluation(composed(*BASE, f"task={task}"))} for task in ("latency", "flocking"))
    assert {"platform", "cpus", "offload_dense", "cpu_onednn"} <= timed - other
    assert only_evaluation(composed(*BASE, "task.shots=0"))["task.embedded_shots"] is None, "no shots are read"


# What is called, and what more makes the same run of it.
SAME = {
    "": [
        *("output_dir=elsewhere", "tags=[mine]", "wandb.mode=disabled", "wandb.project=other", "wandb.group=night"),
        *("model.licence_gate=https://example.org", "offload_dense=true", "cpu_onednn=false", "sparsity=0.50"),
        *("device=cpu", "mode=compact"),  # what auto stands for
        *("grid.sparsity=[0.5]", "grid.statistic=[griffin]"),
    ],
    "sparsity=0": ["method=recipe sparsity=0", "sparsity=[0,0,0]", "sparsity=0.0"],
}
# What is told, too, to change nothing.
IDLE = {
    "": ["draft_tokens=3", "draft_vocabulary=full", "verification_threshold=0.3"],  # it has no drafts
    "sparsity=0": [  # a dense run has no method
        *("statistic=wanda", "selection=sample", "compensation=ridge", "budget=late", "draft_tokens=3"),
        *("mode=masked", "shared_experts=true"),
    ],
    "task=flocking": ["sparsity=0.7", "method=recipe", "grid.statistic=[wanda]"],
    "verification=exact": ["verification_threshold=0.3"],
    "grid.statistic=[griffin]": ["statistic=wanda"],  # the grid's are taken
}
# What makes another run, by another method in the same evaluation; and what makes another evaluation.
METHOD = {
    "": [
        *("sparsity=0.25", "sparsity=[0.5,0.5,0.5]", "statistic=wanda", "compensation=ridge", "budget=late"),
        *("method=recipe", "selection=sample", "shared_experts=true", "mode=masked"),
        *("verification=exact draft_tokens=3", "verification=threshold verification_threshold=0.3", "sparsity=0"),
    ],
    "sparsity=0 assistance=prompt_lookup": ["draft_tokens=3"],
    "verification=exact": ["draft_tokens=3", "draft_vocabulary=full"],
    "verification=threshold": ["draft_tokens=3", "draft_vocabulary=full", "verification_threshold=0.3"],
    "grid.verification=[exact,none]": ["draft_tokens=3"],  # some of the call's methods draft
    "grid.verification=[threshold,exact]": ["verification_threshold=0.3"],
    "grid.sparsity=[0.5,0]": ["shared_experts=true"],
}
OTHER = {
    "": [
        *("seed=1", "limit=4", "offset=1", "batch_size=2", "batch_size=auto"),
        *("model.dtype=bfloat16", "model.add_bos_token=true", "model.revision=v2"),
        *("model.architecture.hidden_size=128", "task.max_new_tokens=7", "task.shots=0", "task.stop=END"),
        *("task.instruction=Shorter", "task.decoding=reference_sampling"),
    ],
    "sparsity=0": ["seed=1", "batch_size=2", "task.max_new_tokens=7", "model.dtype=bfloat16"],
    "task=flocking": ["limit=4", "offset=3"],
    "task=latency": ["cpu_onednn=false"],
}
CHANGES = [(table, call, more) for table in (SAME, IDLE, METHOD, OTHER) for call in table for more in table[call]]


@pytest.mark.parametrize(("table", "call", "more"), CHANGES, ids=[f"{call} {more}" for _, call, more in CHANGES])
def test_what_makes_another_run_and_another_evaluation(table: dict[str, list[str]], call: str, more: str) -> None:
    before, after = (composed(*BASE, *call.split(), *added.split()) for added in ("", more))
    runs = [[identity(config, method, "cpu") for method in config.methods()] for config in (before, after)]
    assert (runs[0] == runs[1]) == (table in (SAME, IDLE))
    assert (only_evaluation(before) == only_evaluation(after)) == (table is not OTHER)
    assert unused([*more.split(), "output_dir=x"], after) == ([more] if table is IDLE else [])


def test_limits_are_told_to_change_no_times() -> None:
    assert unused(["limit=3", "seed=1"], composed(*BASE, "task=latency")) == ["limit=3"]


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
