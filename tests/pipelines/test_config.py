"""What is in conf/: every choice composes into a checked configuration that can be run; and what the commands say."""

import dataclasses
import inspect
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from calling import Entry, composed, environment, process, run_folder, tiny
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM

from griffin.feedforward import LAYOUTS
from pipelines import config, task_config
from pipelines.composition import CONF
from pipelines.hub import what_to_do
from pipelines.method_keys import AXES

HARNESS = [sys.executable, "-m", "pipelines.harness"]

NODES = list(
    dict.fromkeys(
        node
        for module in (config, task_config)
        for _, node in inspect.getmembers(module, dataclasses.is_dataclass)
        if node.__module__.startswith("pipelines.")
    )
)
PROMISED_MODELS = (
    *("gemma_2b", "gemma_7b", "llama2_7b", "llama2_13b", "relu_llama2_7b", "mistral_7b", "opt_6_7b", "opt_13b"),
    *("llama3_8b", "qwen3_8b", "gemma3_1b", "smollm2_135m", "gemma3_270m", "llama3_8b_instruct", "qwen3_8b_instruct"),
    *("qwen2_5_coder_0_5b", "qwen2_5_coder_1_5b", "qwen2_5_coder_7b"),
)


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def as_written(model: str) -> dict[str, Any]:
    """A model's file, without the defaults of the class it extends."""
    return dict(OmegaConf.load(CONF / "model" / f"{model}.yaml"))


RANDOM_MODELS = [name for name in choices("model") if as_written(name)["source"] == "random"]


@pytest.mark.parametrize("name", choices("model"))
def test_every_model_composes(name: str) -> None:
    model, written = composed(f"model={name}").model, as_written(name)
    assert model.name == name
    assert {*PROMISED_MODELS} <= {*choices("model")}
    if name in PROMISED_MODELS:  # both change results, so neither is left to a default
        assert written["dtype"] in config.DTYPES
        assert isinstance(written["add_bos_token"], bool)
    if model.source == "hub":
        assert all(model.repo.partition("/"))
    if model.source == "random":
        assert model.architecture["vocab_size"] >= 2 + 256, "every byte token"


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in ("task", "experiment") for name in choices(group)]
)
def test_every_task_and_experiment_composes(group: str, name: str) -> None:
    config = composed(f"{group}={name}", *(["task.allow_code_execution=true"] if name == "humaneval" else []))
    assert config.task.name == name if group == "task" else config != composed()


@pytest.mark.parametrize("name", RANDOM_MODELS)
def test_random_architectures_have_feedforward_blocks_of_a_known_layout(name: str) -> None:
    shape = dict(composed(f"model={name}").model.architecture)
    shape = AutoConfig.for_model(shape.pop("model_type"), **shape)
    with torch.device("meta"):  # the shape alone: some would not fit into memory
        model = AutoModelForCausalLM.from_config(shape)
    children = [{name for name, _ in module.named_children()} for module in model.get_decoder().modules()]
    blocks = [names for names in children if any({*layout.inputs, layout.output} <= names for layout in LAYOUTS)]
    assert len(blocks) == shape.num_hidden_layers


@pytest.mark.parametrize(
    ("overrides", "settled"),
    [
        *((one, (1, "compact")) for one in ("", "batch_size=1", "mode=compact", "batch_size=auto verification=exact")),
        ("mode=masked", (1, "masked")),
        ("batch_size=4", (4, "masked")),
        ("batch_size=4 shared_experts=true", (4, "compact")),
        ("batch_size=4 shared_experts=true mode=masked", (4, "masked")),
        # An automatic size is 1 where rows run one by one.
        *((f"batch_size=auto {one}", (1, "compact")) for one in ("mode=compact", "offload_dense=true", "task=latency")),
        ("batch_size=auto task=flocking", (1, "compact")),
        *((f"batch_size=auto {one}", ("auto", "masked")) for one in ("task=briefs", "task=fidelity")),
        ("batch_size=auto task.decoding=reference_sampling", ("auto", "masked")),
        ("batch_size=auto task=perplexity task.data_files=README.md", ("auto", "masked")),
    ],
)
def test_auto_is_what_goes_with_the_other_keys(overrides: str, settled: tuple[object, str]) -> None:
    config = composed(*overrides.split())
    assert (config.batch_size, config.mode) == settled


def test_help_has_every_key_with_its_default_and_every_choice(call: Entry) -> None:
    items = [item for node in NODES for item in dataclasses.fields(node)]
    assert [item.name for item in items if not item.metadata.get("help", "").strip()] == []
    shown = call("--help").out
    prefixes = {
        config.RunConfig: "",
        config.MethodKeys: "",
        config.ModelConfig: "model.",
        task_config.HubDataset: "task.hub.",
        config.GridConfig: "grid.",
        config.WandbConfig: "wandb.",
    }
    keys, listed = shown.split("\nChoices\n")
    lines = {line.split()[0]: line for line in keys.splitlines() if line.startswith("  ")}
    names = {prefixes.get(node, "task.") + item.name for node in NODES for item in dataclasses.fields(node)}
    assert names - {"grid", "wandb"} <= {*lines}  # of which every key is listed
    for group in ("model", "task", "method", "experiment", "launcher"):
        assert group in lines
        assert f"{group} {', '.join(choices(group))}" in " ".join(listed.split())
    defaults = {"sparsity": "0.5", "model": "smollm2_135m", "task.allow_code_execution": "false", "tags": "[]"}
    defaults |= {"statistic": "griffin", "limit": "null", "compile": "auto", "output_dir": "outputs"}
    assert [key for key, value in defaults.items() if not lines[key].endswith(f"({value})")] == []
    assert [word for word in ("schema", "object at 0x", "MISSING") if word in shown] == []


def test_help_that_is_cut_off_ends_quietly(tmp_path: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -m pipelines.run --help | head -1"
    ended = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert ended.stderr == ""
    assert ended.stdout.startswith("GRIFFIN")


def test_prompts_that_were_all_too_long_are_told(call: Entry, tmp_path: Path) -> None:
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
    ended.refused(words)
    assert bool(ended.lines("griffin: griffin 50%, protocol=paper, seed=0")) == (words == "/nowhere")
