"""Which ways to decode a pruned model can follow."""

from __future__ import annotations

import copy
from typing import Any

from transformers.generation import GenerationMode

# The ways to decode in which one sequence of forward calls fills one cache, prompt first. Beams of one prompt are
# rows with the same experts, so swapping them is harmless.
_DECODINGS = {
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
}


def refuse_decoding(default: Any, given: Any, kwargs: dict[str, Any], *, one_text: bool = False) -> None:
    """Refuse ways to decode whose forward calls are not a prompt followed by its continuation.

    `generate` takes an option from its arguments, else from the config it is given, else from the model's own.

    Args:
        default: the model's generation config.
        given: the one passed to `generate`, or None.
        kwargs: the other arguments of `generate`.
        one_text: a prompt may have one continuation only, that grows at its end: no beams, no several sequences.

    Raises:
        ValueError: names the option.
    """
    merged = copy.deepcopy(default)
    for options in (vars(given) if given is not None else {}, kwargs):
        for name, value in options.items():
            if value is not None and hasattr(merged, name):
                setattr(merged, name, value)

    if merged.use_cache is False:
        raise ValueError("use_cache=False: pruning needs the KV cache to tell the prompt from what follows")
    if merged.guidance_scale not in (None, 1):
        raise ValueError(f"guidance_scale={merged.guidance_scale}: a second, unconditional prompt is not supported")
    if kwargs.get("custom_generate") is not None:
        raise ValueError("custom_generate is not supported: its forward calls are unknown")
    for name in ("num_beams", "num_return_sequences"):
        if one_text and (getattr(merged, name) or 1) > 1:
            raise ValueError(f"{name}={getattr(merged, name)}: refresh follows one text a prompt")
    decoding = merged.get_generation_mode(kwargs.get("assistant_model"))
    if decoding not in _DECODINGS:
        allowed = ", ".join(sorted(mode.value for mode in _DECODINGS))
        raise ValueError(f"{decoding.value} is not supported with pruning; supported: {allowed}")
