"""Loading a model and its tokenizer, from wherever its configuration says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import griffin
from pipelines.config import ModelConfig
from pipelines.errors import UserError, first_line, out_of_memory
from pipelines.hub import commit_of, prepare_hub, what_to_do
from pipelines.packaged_models import converted


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer.

    Attributes:
        context_length: the most tokens, prompt and generation together, that the model was made for.
        device: what it runs on, in words.
        revision: the commit of its hub repository; None where it comes from elsewhere.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    add_bos_token: bool
    context_length: int
    device: str
    revision: str | None = None

    def encode(self, prompt: str, chat_template: bool = False, said: Sequence[tuple[str, str]] = ()) -> list[int]:
        """The prompt's token ids, with the BOS token in front where the model's configuration asks for it.

        With `chat_template` the prompt is what a user says to the model, in the model's own format of a conversation,
        after what both have `said` before.
        """
        if chat_template:
            self.need_chat_template()
            turns = [turn for user, model in said for turn in (("user", user), ("assistant", model))]
            chat = [{"role": role, "content": content} for role, content in (*turns, ("user", prompt))]
            return self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return [self.tokenizer.bos_token_id, *ids] if self.add_bos_token else ids

    def need_chat_template(self) -> None:
        """Raises UserError where the model has no format of conversations."""
        if not self.tokenizer.chat_template:
            raise UserError("task.chat_template=true: the model has no chat template; expected an instruction model")


def device_kind(device: str) -> str:
    """cpu, cuda or mps: what `device=auto` stands for on this machine; UserError where the device is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.partition(":")[0]
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[kind]
    if not there or (":" in device and int(device.partition(":")[2]) >= torch.cuda.device_count()):
        raise UserError(f"device={device}: not on this machine; use device=auto")
    return kind


def load(
    config: ModelConfig, device: str, seed: int, *, offload_dense: bool = False, onednn: bool = False
) -> LoadedModel:
    """Load a model for evaluation.

    Args:
        config: which model.
        device: as `RunConfig.device`; `auto` with GPUs spreads the layers over them.
        seed: of random weights.
        offload_dense: leave the FF weights in host memory; the model then runs by an engine that knows, on one GPU.
        onednn: run linear layers by oneDNN, on a CPU.

    Raises:
        UserError: the model cannot be had: no connection, no licence, no package, no such device; or not offloaded.
    """
    kind = device_kind(device)
    one_device = kind if device == "auto" else device
    if config.source == "random":
        model, tokenizer = _random(config, one_device, seed)
    else:
        spread = device == "auto" and kind == "cuda"
        model, tokenizer = _pretrained(config, "cpu" if offload_dense else "auto" if spread else one_device)
    if offload_dense:
        try:
            griffin.move_without_dense(model, one_device)
        except griffin.UnsupportedModelError as reason:
            raise UserError(f"model={config.name}: {reason}") from reason
    model.eval().requires_grad_(False)
    # Nothing of how a checkpoint likes to be sampled may leak into an evaluation; only its end tokens stay.
    model.generation_config = GenerationConfig(
        eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id
    )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.add_bos_token and tokenizer.bos_token_id is None:
        raise UserError(f"model.add_bos_token=true: the tokenizer of {config.name} has no BOS token")
    repo = config.repo if config.source == "hub" and not Path(config.repo or "").is_dir() else None
    cached = try_to_load_from_cache(repo, "config.json", revision=config.revision or "main") if repo else None
    return LoadedModel(
        griffin.with_onednn(model) if onednn and kind == "cpu" else model,
        tokenizer,
        config.add_bos_token,
        model.config.get_text_config().max_position_embeddings,
        torch.cuda.get_device_name() if kind == "cuda" else kind,
        commit_of(cached if isinstance(cached, str) else None),
    )


def _pretrained(config: ModelConfig, place: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    options: dict[str, Any] = {}
    if config.source == "hub":
        prepare_hub()
        source: Any = config.repo
        options = {"revision": config.revision or "main"}
    else:
        source = converted(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=config.dtype, device_map=place, use_safetensors=True, trust_remote_code=False, **options
        )
    except (OSError, ValueError) as error:
        advice = f"; {what_to_do()}" if config.source == "hub" and not Path(config.repo or "").is_dir() else ""
        gated = config.licence_gate and (config.repo or "") in config.licence_gate  # not where another repo is named
        gate = f" (a gated model: its licence must have been accepted at {config.licence_gate})" if gated else ""
        reason = first_line(error).rstrip(".")
        raise UserError(f"model={config.name}: cannot load {source}: {reason}{gate}{advice}") from error
    return model, tokenizer


def _random(config: ModelConfig, device: str, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    architecture = dict(config.architecture)
    model_type = architecture.pop("model_type", None)
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"model.architecture.model_type={model_type}: not a causal language model of transformers")
    tokenizer = _byte_tokenizer()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    try:
        shape = AutoConfig.for_model(model_type, **(ends | architecture))
        torch.manual_seed(seed)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, config.dtype))
    except (KeyError, ValueError, TypeError, RuntimeError, StrictDataclassError) as error:
        if out_of_memory(error):
            raise
        raise UserError(f"model.architecture={config.architecture}: {error}") from error
    return model, tokenizer


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8, so that a model of random weights runs every task without a download."""
    specials = ["<|bos|>", "<|eos|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=specials[0], eos_token=specials[1])
