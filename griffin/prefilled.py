"""`generate` from a prompt that has run already.

Dimensions: B = prompts, V = vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.modeling_outputs import CausalLMOutputWithPast


@contextlib.contextmanager
def prefilled(model: nn.Module, logits_BV: Tensor) -> Iterator[None]:
    """`model.generate` in this context goes on from the prompts' dense pass, instead of running them again.

        logits = shared.run_each(prompts)
        with shared.pruned(experts, None, "masked"), griffin.prefilled(model, logits):
            model.generate(ids, attention_mask=mask, past_key_values=shared.fork(room))

    Greedily, by sampling or with beams; what `generate` counts as prompt and as new tokens is as ever.

    Args:
        model: whose `generate` is called with the whole prompts, padded on the left, and a copy of their KV cache.
        logits_BV: the logits after each prompt, of `SharedPrompt.run_each`.
    """
    decoder: Any = model

    def prefill(
        ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any], **_: Any
    ) -> CausalLMOutputWithPast:
        cache, copies = model_kwargs["past_key_values"], len(ids) // len(logits_BV)
        if copies > 1:  # beams
            cache.batch_repeat_interleave(copies)
        return CausalLMOutputWithPast(logits=logits_BV.repeat_interleave(copies, dim=0)[:, None], past_key_values=cache)

    # The first step of every way to decode. It has no public form: to a cache that holds the whole prompt `generate`
    # would have no token left to run.
    decoder._prefill = prefill
    try:
        yield
    finally:
        del decoder._prefill
