"""What the commands say of themselves: the help texts, lm-eval's command, prompts that were all too long."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from calling import Outcome, environment, process, run_folder, tiny

from pipelines.hub import what_to_do
from pipelines.method_keys import AXES

HARNESS = [sys.executable, "-m", "pipelines.harness"]


def test_help_has_every_default_and_says_what_each_group_is(call: Callable[..., Outcome]) -> None:
    shown = call("--help").out
    for line in (
        *("  launcher ", "  experiment ", "  sparsity "),
        *("(0.5)", "(griffin)", "(null)", "(auto)", "(false)", "([])", "(outputs)"),
    ):
        assert line in shown
    keys, choices = shown.split("\nChoices\n")
    lines = {line.split()[0]: line for line in keys.splitlines() if line.startswith("  ")}
    for name in ("smollm2_135m", "briefs", "slurm_gpu", "paper_latency"):
        assert name in choices
    assert "schema" not in choices
    assert lines["sparsity"].endswith("(0.5)")
    assert lines["model"].endswith("(smollm2_135m)")
    assert lines["task.allow_code_execution"].endswith("(false)")
    assert "object at 0x" not in shown
    assert "MISSING" not in shown


def test_help_that_is_cut_off_ends_quietly(tmp_path: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -m pipelines.run --help | head -1"
    ended = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert ended.stderr == ""
    assert ended.stdout.startswith("GRIFFIN")


def test_prompts_that_were_all_too_long_are_told(call: Callable[..., Outcome], tmp_path: Path) -> None:
    ended = call(*tiny(tmp_path / "out", "model.architecture.max_position_embeddings=12"))
    (warning,) = ended.lines("warning: ")
    assert f"{run_folder(tmp_path / 'out')}: finished, but every prompt was skipped (longer than 4 tokens" in warning


@pytest.mark.parametrize(("value", "words"), [("1", "HF_HUB_OFFLINE is set"), ("", "check the connection")])
def test_a_user_without_the_hub_is_told_what_to_do(value: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert what_to_do().startswith(words)
    assert "python -m pipelines.prefetch" in what_to_do()


def test_lm_evals_command_knows_our_arguments(tmp_path: Path) -> None:
    shown = process([*HARNESS, "--help"], tmp_path)
    assert shown.code == 0
    lines = [line.split()[0] for line in shown.out.splitlines() if line.startswith("  ")]
    assert {*AXES, "method", "protocol", "seed"} <= {*lines}
    assert "usage: lm-eval" in shown.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("pretrained=x,sparsty=0.5", "--model_args sparsty=0.5: no such argument (did you mean sparsity?)"),
        ("pretrained=x,sparsity=1.5", "sparsity=1.5: expected 0 <= sparsity < 1"),
        ("sparsity=0.5", "--model_args: expected pretrained=NAME"),
        ("pretrained=/nowhere,sparsity=0.5", "/nowhere"),
    ],
)
def test_a_mistake_in_them_is_one_line(arguments: str, words: str, tmp_path: Path) -> None:
    ended = process([*HARNESS, "--model", "griffin", "--model_args", arguments, "--tasks", "piqa"], tmp_path)
    assert ended.code == 1
    (error,) = ended.lines("error: ")
    assert words in error
    assert "Traceback" not in ended.err
    assert bool(ended.lines("griffin: griffin 50%, protocol=paper, seed=0")) == (words == "/nowhere")
