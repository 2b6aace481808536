"""`model.generate` on the engine: our decoding loop with transformers' logits processors, stopping and streamers.

`generate` prepares everything and then calls the decoding method that it is given (`custom_generate`).

Dimensions: B = prompts, S = their tokens, padding included, V = vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationMode,
    StoppingCriteriaList,
    StopStringCriteria,
)

from griffin.decoding import decode
from griffin.engine import Engine
from griffin.method import Method
from griffin.prompt import prefill, wanted
from griffin.rows import Generation, Row, begin

# The ways to decode in which one sequence of forward calls fills one cache, prompt first. Beams of one prompt are rows
# with the same experts, so swapping them is harmless.
_DECODINGS = {
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
}


def generate_on_engine(
    generate: Callable[..., Any],
    engine: Engine,
    method: Method,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    seed: int,
    shared: bool,
) -> tuple[Any, list[Row]]:
    """Call `generate` so that prompts run dense and their texts go on under a method, row by row as the engine does it.

    Args:
        generate: the model's own.
        engine: of the model.
        method: how prompts are continued.
        args: of `generate`.
        kwargs: of `generate`.
        seed: of random selections.
        shared: whether all prompts share one set of experts.

    Returns:
        What `generate` returns, and the rows that ran.
    """
    rows: list[Row] = []
    streamer = kwargs.get("streamer", args[7] if len(args) > 7 else None)
    if kwargs.get("stop_strings") is not None and kwargs.get("tokenizer") is not None:
        # `generate` keeps the tokenizer from decoding methods that are not its own.
        stop = StopStringCriteria(kwargs["tokenizer"], kwargs["stop_strings"])
        criteria = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or []), stop])
        kwargs = {**kwargs, "stopping_criteria": criteria, "tokenizer": None, "stop_strings": None}

    def loop(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        if streamer is not None and len(input_ids) > 1:
            raise ValueError(f"a streamer and {len(input_ids)} prompts: expected one prompt")
        mask = model_kwargs.get("attention_mask")
        prompts = [ids if mask is None else ids[mask[row].bool()] for row, ids in enumerate(input_ids)]
        likely = method.prunes_vocabulary
        states = [prefill(engine, [ids.tolist()], wanted([method]), likely_tokens=likely)[0] for ids in prompts]
        # Each row's label is its place in the batch.
        groups = (
            [(states, range(len(states)))] if shared else [([state], [place]) for place, state in enumerate(states)]
        )
        rows.extend(row for group, places in groups for row in begin(engine, group, method, seed, places))
        texts = _Texts(input_ids, logits_processor, stopping_criteria, generation_config, streamer)
        limit = generation_config.max_length - input_ids.shape[1]
        generation = Generation(limit, texts.pick, texts.ended, texts.scores, texts.draw)
        for _ in decode(engine, rows, len(rows), len(rows), max(map(len, prompts)), generation):
            pass
        return texts.result(rows)

    return generate(*args, **kwargs, custom_generate=loop), rows


class _Texts:
    """How the texts of a batch are picked and ended, by what `generate` prepared. A row's label is its place in it."""

    def __init__(self, ids_BS: Tensor, processor: Any, criteria: Any, config: Any, streamer: Any) -> None:
        self._ids_BS, self._processor, self._criteria, self._config = ids_BS, processor, criteria, config
        self._streamer = streamer
        self._steps: dict[str, list[Tensor]] = {"logits": [], "scores": []}
        self.scores = self._scores if processor else None
        self.draw = self._draw if config.do_sample else None

    def _text(self, row: Row, drafted: Sequence[int] = ()) -> Tensor:
        """[S + N]: its prompt with its padding, its tokens so far, and those drafted behind them."""
        return torch.cat([self._ids_BS[row.label], self._ids_BS.new_tensor([*row.tokens, *drafted])])

    def pick(self, rows: Sequence[Row], logits_BV: Tensor) -> Tensor:
        """The next token of each row [B], by the logits processors, greedily or by sampling."""
        places_B = torch.tensor([row.label for row in rows], device=logits_BV.device)
        scores_BV = self._processor(torch.stack([self._text(row) for row in rows]), logits_BV.clone())
        for name, of_rows_BV in (("logits", logits_BV), ("scores", scores_BV)):
            if self._config.return_dict_in_generate and getattr(self._config, f"output_{name}"):
                all_BV = of_rows_BV.new_zeros(len(self._ids_BS), of_rows_BV.shape[1])  # ended rows have none
                self._steps[name].append(all_BV.index_copy(0, places_B, of_rows_BV))
        if self._config.do_sample:
            tokens_B: Tensor = torch.multinomial(scores_BV.softmax(dim=-1), num_samples=1).squeeze(1)
        else:
            tokens_B = scores_BV.argmax(dim=-1)
        return tokens_B

    def _scores(self, row: Row, drafted: Sequence[int], logits_V: Tensor) -> Tensor:
        scores_1V: Tensor = self._processor(self._text(row, drafted).unsqueeze(0), logits_V.unsqueeze(0).clone())
        return scores_1V[0]

    def _draw(self, row: Row, chances_N: Tensor) -> Tensor:
        return torch.multinomial(chances_N, num_samples=1)

    def ended(self, row: Row) -> bool:
        """Whether a stopping criterion ends the row with its newest token, which the streamer gets to hear."""
        if self._streamer is not None:
            self._streamer.put(torch.tensor(row.tokens[-1:]))
        return bool(self._criteria(self._text(row).unsqueeze(0), None))

    def result(self, rows: Sequence[Row]) -> Any:
        """What `generate` returns: rows that have ended before others are padded."""
        if self._streamer is not None:
            self._streamer.end()
        padding = self._config._pad_token_tensor  # None where neither it nor an end token is named
        new_BN = self._ids_BS.new_full(
            (len(rows), max(len(row.tokens) for row in rows)), 0 if padding is None else int(padding)
        )
        for row in rows:
            new_BN[row.label, : len(row.tokens)] = new_BN.new_tensor(row.tokens)
        sequences_BS = torch.cat([self._ids_BS, new_BN], dim=1)
        if not self._config.return_dict_in_generate:
            return sequences_BS
        given = {name: tuple(values) for name, values in self._steps.items() if values}
        return GenerateDecoderOnlyOutput(sequences=sequences_BS, **given)


def refuse_decoding(default: Any, given: Any, kwargs: dict[str, Any], axis: str | None = None) -> None:
    """Refuse ways to decode whose forward calls are not a prompt followed by its continuation.

    `generate` takes an option from its arguments, else from the config it is given, else from the model's own.

    Args:
        default: the model's generation config.
        given: the one passed to `generate`, or None.
        kwargs: the other arguments of `generate`.
        axis: what has our own loop decode, `refresh` or `verification`: one text a prompt, that grows at its end.

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
    if axis is not None:
        for name in ("num_beams", "num_return_sequences"):
            if (getattr(merged, name) or 1) > 1:
                raise ValueError(f"{name}={getattr(merged, name)}: {axis} follows one text a prompt; expected 1")
        for name in ("output_scores", "output_logits"):
            if axis == "verification" and merged.return_dict_in_generate and getattr(merged, name):
                raise ValueError(f"{name}=True: a verified token has a draft's and a check's; expected False")
    decoding = merged.get_generation_mode(kwargs.get("assistant_model"))
    if decoding not in _DECODINGS:
        allowed = ", ".join(sorted(mode.value for mode in _DECODINGS))
        raise ValueError(f"{decoding.value} is not supported with pruning; supported: {allowed}")
