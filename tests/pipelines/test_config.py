"""What is in conf/: every choice composes into a checked configuration that can be run."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calling import Outcome, composed
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM

from griffin.feedforward import LAYOUTS
from pipelines import config, model_config, task_config
from pipelines.composition import CONF

NODES = list(
    dict.fromkeys(
        node
        for module in (config, model_config, task_config)
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
    assert composed(f"model={name}").model.name == name


@pytest.mark.parametrize("name", choices("task"))
def test_every_task_composes(name: str) -> None:
    allowed = ["task.allow_code_execution=true"] if name == "humaneval" else []
    assert composed(f"task={name}", *allowed).task.name == name


@pytest.mark.parametrize("name", choices("experiment"))
def test_every_experiment_composes_and_says_what_to_run(name: str) -> None:
    assert composed(f"experiment={name}") != composed()


@pytest.mark.parametrize("name", PROMISED_MODELS)
def test_promised_models_say_their_dtype_and_whether_prompts_begin_with_bos(name: str) -> None:
    # Both change results, so neither is left to a default.
    written = as_written(name)
    assert written["dtype"] in model_config.DTYPES
    assert isinstance(written["add_bos_token"], bool)


@pytest.mark.parametrize("name", [name for name in choices("model") if as_written(name)["source"] == "hub"])
def test_hub_models_name_a_repository(name: str) -> None:
    owner, _, repository = composed(f"model={name}").model.repo.partition("/")
    assert owner
    assert repository


@pytest.mark.parametrize("name", RANDOM_MODELS)
def test_random_architectures_have_feedforward_blocks_of_a_known_layout(name: str) -> None:
    shape = dict(composed(f"model={name}").model.architecture)
    shape = AutoConfig.for_model(shape.pop("model_type"), **shape)
    with torch.device("meta"):  # the shape alone: some would not fit into memory
        model = AutoModelForCausalLM.from_config(shape)
    children = [{name for name, _ in module.named_children()} for module in model.get_decoder().modules()]
    blocks = [names for names in children if any({*layout.inputs, layout.output} <= names for layout in LAYOUTS)]
    assert len(blocks) == shape.num_hidden_layers


@pytest.mark.parametrize("name", RANDOM_MODELS)
def test_random_architectures_know_every_byte_token(name: str) -> None:
    assert composed(f"model={name}").model.architecture["vocab_size"] >= 2 + 256


@pytest.mark.parametrize(
    ("overrides", "mode"),
    [
        ([], "compact"),
        (["batch_size=1"], "compact"),
        (["batch_size=4"], "masked"),
        (["batch_size=4", "shared_experts=true"], "compact"),
        (["batch_size=4", "shared_experts=true", "mode=masked"], "masked"),
        (["mode=masked"], "masked"),
        (["mode=compact"], "compact"),
        (["batch_size=auto", "verification=exact"], "compact"),
    ],
)
def test_auto_mode_is_compact_where_one_expert_set_does(overrides: list[str], mode: str) -> None:
    assert composed(*overrides).mode == mode


@pytest.mark.parametrize("node", NODES)
def test_every_key_has_a_help_text(node: Any) -> None:
    assert [item.name for item in dataclasses.fields(node) if not item.metadata.get("help", "").strip()] == []


def test_help_prints_every_key_and_every_choice(call: Callable[..., Outcome]) -> None:
    shown = call("--help")
    assert shown.code == 0
    prefixes = {
        config.RunConfig: "",
        config.MethodKeys: "",
        model_config.ModelConfig: "model.",
        task_config.HubDataset: "task.hub.",
        config.GridConfig: "grid.",
        config.WandbConfig: "wandb.",
    }
    first_words = {line.split()[0] for line in shown.out.splitlines() if line.strip()}
    keys = {prefixes.get(node, "task.") + item.name for node in NODES for item in dataclasses.fields(node)}
    assert keys - {"grid", "wandb"} <= first_words  # of which every key is listed
    for group in ("model", "task", "method", "experiment"):
        assert f"{group} {', '.join(choices(group))}" in " ".join(shown.out.split())


def test_what_is_composed_can_be_shown_without_running_it(call: Callable[..., Outcome]) -> None:
    shown = call("--cfg", "job", "model=gemma_7b", "task=xsum", "sparsity=0.25")
    assert shown.code == 0
    assert OmegaConf.create(shown.out).sparsity == 0.25
