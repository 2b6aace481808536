"""Fidelity: how far a method's next-token distributions are from the dense model's, on the dense model's own text.

The dense model continues a prompt greedily. Each method then reads the same continuation from the dense prompt's KV
cache with its own experts, and every next-token distribution is compared. Far more sensitive than ROUGE: thousands
of distributions where a task has dozens of answers, and no sampling noise.

Dimensions: C = continuation tokens, V = vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import griffin
from pipelines.config import RunConfig
from pipelines.methods import Method, continued, shared_prompt
from pipelines.models import LoadedModel
from pipelines.records import Sample, mean_and_stderr
from pipelines.tasks.prompts import Prompt, read_prompts


def read(config: RunConfig) -> list[Prompt]:
    """The prompts of a generation task.

    Raises:
        UserError: the data is missing, malformed or unreachable.
    """
    return read_prompts(config.task, config.limit, config.offset)


def evaluate(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    config: RunConfig,
    methods: Sequence[Method],
    done: dict[Method, set[int]],
) -> Iterator[tuple[Method, list[Sample]]]:
    """Compare every method with dense, prompt by prompt: one dense pass, then one short pass a method."""
    steps = config.task.max_new_tokens
    room = loaded.context_length - steps
    shared = shared_prompt(loaded.model, methods)
    for prompt in prompts:
        needed = [method for method in methods if prompt.index not in done[method]]
        if not needed:
            continue
        ids = loaded.encode(prompt.text)
        sample: Sample = {"index": prompt.index, "id": prompt.id, "prompt_tokens": len(ids)}
        if len(ids) > room:
            for method in needed:
                yield method, [sample | {"skipped": f"longer than {room} tokens"}]
            continue
        began = time.perf_counter()
        continuation_1C = _greedy(loaded, shared, ids, steps)
        length_1 = torch.tensor([continuation_1C.shape[1]], device=continuation_1C.device)
        dense_CV = shared.continued(continuation_1C, length_1, None)[0].float().log_softmax(dim=-1)
        shared_seconds = (time.perf_counter() - began) / len(needed)
        for method in needed:
            began = time.perf_counter()
            logits = continued(shared, method, continuation_1C, length_1, config.seed)
            pruned_CV = logits[0].float().log_softmax(dim=-1)
            kl_C, agreement_C = compare(dense_CV, pruned_CV)
            seconds = shared_seconds + time.perf_counter() - began
            yield (
                method,
                [
                    sample
                    | {
                        "generated_tokens": continuation_1C.shape[1],
                        "kl": float(kl_C.mean()),
                        "top1_agreement": float(agreement_C.mean()),
                        "seconds": round(seconds, 4),
                        "kl_by_token": [round(float(kl), 6) for kl in kl_C],
                    }
                ],
            )


def compare(dense_CV: Tensor, pruned_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Per position [C], KL(dense || pruned) in nats, and 1 where the most likely token is the same, else 0.

    Args:
        dense_CV: log-probabilities of the dense model.
        pruned_CV: log-probabilities of the pruned model.
    """
    kl_C = (dense_CV.exp() * (dense_CV - pruned_CV)).sum(dim=-1)
    agreement_C = dense_CV.argmax(dim=-1) == pruned_CV.argmax(dim=-1)
    return kl_C, agreement_C.float()


def metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """`kl` and `top1_agreement` with standard errors over prompts, and counts."""
    compared = [sample for sample in samples if "skipped" not in sample]
    values: dict[str, float] = {}
    for name in ("kl", "top1_agreement") if compared else ():
        values[name], values[f"{name}_stderr"] = mean_and_stderr([sample[name] for sample in compared])
    return values | {"samples": len(compared), "skipped_prompts": len(samples) - len(compared)}


def _greedy(loaded: LoadedModel, shared: griffin.SharedPrompt, ids: list[int], steps: int) -> Tensor:
    """The dense model's greedy continuation, [1, C]: up to `steps` tokens, ending with an end token if it comes.

    Runs the prompt through `shared`, which can be continued afterwards.
    """
    device = loaded.model.device
    logits = shared.run(torch.tensor([ids], device=device), torch.tensor([len(ids)], device=device), last=1)
    eos = loaded.model.generation_config.eos_token_id
    ends = {*(eos if isinstance(eos, list) else [eos])}
    cache = shared.fork(steps)
    tokens = [int(logits[0, -1].argmax())]
    with torch.no_grad():
        while len(tokens) < steps and tokens[-1] not in ends:
            step = loaded.model(torch.tensor([tokens[-1:]], device=device), past_key_values=cache, use_cache=True)
            tokens.append(int(step.logits[0, -1].argmax()))
    return torch.tensor([tokens], device=device)
