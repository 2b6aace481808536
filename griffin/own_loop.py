"""`model.generate` on the engine: our decoding loop with transformers' logits processors, stopping and streamers.

`generate` prepares everything and then calls the decoding method that it is given (`custom_generate`). The views of a
model are made at the first call, and go with it.

Dimensions: S = tokens of the prompts, padding included, P = columns of the batch, N = further tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode, StoppingCriteriaList, StopStringCriteria

from griffin.activations import Recorded
from griffin.decoding import decode
from griffin.engine import Engine, refuse_uncroppable
from griffin.kv_cache import append_rows, row_of
from griffin.method import Method
from griffin.prompt import PromptState, prefill, wanted
from griffin.rows import DraftStatistics, Generation, Row, RowStatistics, begin, traffic
from griffin.selection import Experts
from griffin.views import compiler_for, view_of

# The ways to decode in which one sequence of forward calls fills one cache, prompt first. Beams of one prompt are rows
# with the same experts, so swapping them is harmless.
_ALLOWED = {GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE}

# What our loop understands of what `generate` prepares for the model; it makes positions of its own.
_UNDERSTOOD = {"attention_mask", "past_key_values", "use_cache", "cache_position", "position_ids", "logits_to_keep"}


# By model: its tensors as they were, and what runs it. An engine refers to them and not to the model, so it goes with
# the model.
_ENGINES: WeakKeyDictionary[nn.Module, tuple[Any, Engine]] = WeakKeyDictionary()


def _engine_of(model: nn.Module, compiled: bool | str) -> Engine:
    """Made anew where the model has other tensors, or they were moved, converted or trained: quantised weights are
    copies."""
    weights = [
        (id(one), one.device, one.dtype, 0 if one.is_inference() else one._version) for one in model.parameters()
    ]
    if model not in _ENGINES or _ENGINES[model][0] != (compiled, weights):
        _ENGINES.pop(model, None)  # its memory is free before another one is made
        refuse_uncroppable(model)
        compiler = compiler_for(compiled, next(model.parameters()).device)
        _ENGINES[model] = (compiled, weights), Engine(view_of(model), compiler=compiler)
    return _ENGINES[model][1]


@dataclass(eq=False)
class DecodingMethod:
    """A decoding method for `generate`: prompts run dense, and their texts go on under a method.

    Attributes:
        stats: what each text of the last call took.
        drafts: with verification, what became of the draft tokens of each of them.
    """

    method: Method
    seed: int = 0
    shared_experts: bool = False
    compiled: bool | str = False
    experts: Experts | None = None
    streamer: Any = None
    engine: Engine | None = None  # None: that of the model
    turns: MutableMapping[Any, list[PromptState]] = field(default_factory=WeakKeyDictionary)  # see `_prefilled`
    chosen: list[Experts | None] = field(default_factory=list)  # of each prompt, or of all together; None: dense
    stats: list[RowStatistics] = field(default_factory=list)
    drafts: list[DraftStatistics] = field(default_factory=list)

    def run(self, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call `generate` with this decoding method; returns what it returns."""
        if kwargs.get("stop_strings") is not None and kwargs.get("tokenizer") is not None:
            # `generate` keeps the tokenizer from decoding methods that are not its own.
            stop = StopStringCriteria(kwargs["tokenizer"], kwargs["stop_strings"])
            criteria = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or []), stop])
            kwargs = {**kwargs, "stopping_criteria": criteria, "tokenizer": None, "stop_strings": None}
        return generate(*args, **kwargs, custom_generate=self)

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """What `generate` calls.

        Raises:
            ValueError: an option that our loop cannot honour.
            UnsupportedModelError: the model cannot be pruned, or its KV cache cannot be cropped.
        """
        engine = self.engine or _engine_of(model, self.compiled)
        with engine.lock:
            return self._decode(engine, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)

    def _decode(
        self,
        engine: Engine,
        ids_BS: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        config: Any,
        model_kwargs: dict[str, Any],
    ) -> Any:
        for name, value in model_kwargs.items():
            if name not in _UNDERSTOOD and value is not None:
                raise ValueError(f"{name}: expected none of it, since our own decoding loop would not hand it on")
        if self.streamer is not None and len(ids_BS) > 1:
            raise ValueError(f"a streamer and {len(ids_BS)} prompts: expected one prompt")
        if self.engine is None:
            refuse_decoding(config, None, {}, "verification" if self.method.verified else "decode_with")
        cache, mask_BP = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        columns = getattr(config, "_mask_length", ids_BS.shape[1]) if mask_BP is None else mask_BP.shape[1]
        begins = [0] * len(ids_BS) if mask_BP is None else mask_BP.int().argmax(dim=1).tolist()
        if (given := model_kwargs.get("position_ids")) is not None:
            usual_BP = torch.arange(columns) - torch.tensor(begins).unsqueeze(1)
            if not bool((given.cpu() == usual_BP.clamp(min=0)[:, -given.shape[1] :]).all()):
                raise ValueError("position_ids: expected none, since our own decoding loop makes positions of its own")
        states = [self._prefilled(engine, cache, ids_BS, place, begin, columns) for place, begin in enumerate(begins)]
        keep = bool(config.return_dict_in_generate and config.use_cache and cache is not None)
        lengths, rows, shared = [state.length for state in states], list[Row](), self.shares
        while states:  # the memory of prompts goes as rows begin
            group, states = (states, []) if shared else (states[:1], states[1:])
            labels = range(len(rows), len(rows) + len(group))
            rows += begin(engine, group, self.method, self.seed, labels, experts=self.experts, keep_cache=keep)
        del group
        texts = _Texts(ids_BS, logits_processor, stopping_criteria, config, self.streamer)
        limit = config.max_length - ids_BS.shape[1]
        process = texts.process if logits_processor or config.return_dict_in_generate else None
        draw = (lambda row, probabilities_N: probabilities_N.multinomial(1)) if config.do_sample else None
        generation = Generation(limit, texts.ended, process, draw)
        for _ in decode(engine, rows, generation, batch_size=len(rows), max_prompt_tokens=max(lengths)):
            pass
        result = texts.result(rows)
        if keep:
            counts = [length + len(row.tokens) - 1 for length, row in zip(lengths, rows, strict=True)]
            held = [row.state.cache for row in rows if row.state.cache is not None]
            width = columns + max(len(row.tokens) for row in rows) - 1
            append_rows(cache, held, list(zip(begins, counts, strict=True)), width)
            # A text is the beginning of the next turn of its conversation.
            self.turns[cache] = [replace(row.state, cache=None, ids=(*row.state.ids, *row.tokens[:-1])) for row in rows]
            result["past_key_values"] = cache
        for row in rows:
            row.state = replace(row.state, cache=None)
        self._finish(engine, rows)
        return result

    @property
    def shares(self) -> bool:
        """Whether prompts share one set of experts: drafts are checked row by row."""
        return self.shared_experts and not self.method.verified

    def _finish(self, engine: Engine, rows: list[Row]) -> None:
        """Keep what a call took."""
        kept = self.method.kept(engine.widths)
        read = traffic(engine.model, kept, self.method.scorer, self.method.quantization)
        self.chosen = [row.experts for row in (rows[:1] if self.shares else rows)]
        self.stats = [row.statistics(read) for row in rows]
        self.drafts = [row.drafts for row in rows] if self.method.verified else []

    def _prefilled(
        self, engine: Engine, cache: Any, ids_BS: Tensor, place: int, begin: int, columns: int
    ) -> PromptState:
        """The state of one prompt, which goes on from what the cache holds."""
        given, record = ids_BS[place].tolist(), wanted([self.method])
        cached = 0 if cache is None else int(cache.get_seq_length())
        first = max(begin - (columns - len(given)), 0)  # of the given tokens that are no padding
        if not cached:
            prefix, ids = None, given[first:]
        else:
            turns = self.turns.get(cache)
            new = given[cached - (columns - len(given)) :]
            before = given[first : len(given) - len(new)] if len(given) == columns else None
            if turns is not None:
                prefix = replace(turns[place], length=cached - begin)
                before = before or list(prefix.ids)
            else:  # filled elsewhere: what is seen of the prompt is recorded
                likely = torch.empty(0, dtype=torch.int64, device=engine.device)
                nothing = Recorded(totals=dict.fromkeys(record, ()))
                prefix = PromptState((), cached - begin, None, torch.empty(0), nothing, likely=likely)
            ids = [*(before or [0] * (cached - begin)), *new]
            prefix = replace(prefix, cache=row_of(cache, place, begin))
        return prefill(engine, [ids], record, prefix=prefix, likely_tokens=self.method.prunes_vocabulary)[0]


class _Texts:
    """How the texts of a batch are picked and ended, by what `generate` prepared. A row's label is its place in it."""

    def __init__(self, ids_BS: Tensor, processor: Any, criteria: Any, config: Any, streamer: Any) -> None:
        self._ids_BS, self._processor, self._criteria, self._config = ids_BS, processor, criteria, config
        self._streamer = streamer
        self._steps: dict[str, list[Tensor]] = {
            name: []
            for name in ("logits", "scores")
            if config.return_dict_in_generate and getattr(config, f"output_{name}")
        }
        padding = config._pad_token_tensor  # None where neither it nor an end token is named
        self._padding = 0 if padding is None else int(padding)

    def _text(self, row: Row, drafted_N: Tensor | None = None) -> Tensor:
        """[S + N]: its prompt with its padding, its tokens so far, and those drafted behind them."""
        ids_S = torch.cat([self._ids_BS[row.label], self._ids_BS.new_tensor(row.tokens)])
        return ids_S if drafted_N is None else torch.cat([ids_S, drafted_N.to(ids_S.device)])

    def process(self, rows: Sequence[Row], drafted: Sequence[Tensor | None], logits_BV: Tensor) -> Tensor:
        """The processed logits of some rows, each in its own place of the whole batch: processors may ask for it."""
        texts = [self._text(row, drafted_N) for row, drafted_N in zip(rows, drafted, strict=True)]
        places_B = torch.tensor([row.label for row in rows], device=logits_BV.device)
        texts_BP = pad_sequence(texts, batch_first=True, padding_value=self._padding)  # some may have ended
        ids_BP = self._ids_BS.new_full((len(self._ids_BS), texts_BP.shape[1]), self._padding)
        ids_BP.index_copy_(0, places_B.to(ids_BP.device), texts_BP)
        all_BV = logits_BV.new_zeros(len(ids_BP), logits_BV.shape[1]).index_copy_(0, places_B, logits_BV)
        scores_BV = self._processor(ids_BP, all_BV.clone())
        for name, values_BV in (("logits", all_BV), ("scores", scores_BV)):
            if name in self._steps:
                self._steps[name].append(values_BV)
        return torch.index_select(scores_BV, 0, places_B)

    def ended(self, row: Row) -> bool:
        """Whether a stopping criterion ends the row with its newest token, which the streamer gets to hear."""
        if self._streamer is not None:
            self._streamer.put(torch.tensor(row.tokens[-1:]))
        return bool(self._criteria(self._text(row).unsqueeze(0), None))

    def result(self, rows: Sequence[Row]) -> Any:
        """What `generate` returns: rows that have ended before others are padded."""
        if self._streamer is not None:
            self._streamer.end()
        new_BN = self._ids_BS.new_full((len(rows), max(len(row.tokens) for row in rows)), self._padding)
        for row in rows:
            new_BN[row.label, : len(row.tokens)] = new_BN.new_tensor(row.tokens)
        sequences_BS = torch.cat([self._ids_BS, new_BN], dim=1)
        if not self._config.return_dict_in_generate:
            return sequences_BS
        given = {name: tuple(values) for name, values in self._steps.items()}
        return GenerateDecoderOnlyOutput(sequences=sequences_BS, **given)


def refuse_decoding(default: Any, given: Any, kwargs: dict[str, Any], own_loop: str | None = None) -> None:
    """Refuse ways to decode whose forward calls are not a prompt followed by its continuation."""
    merged = copy.deepcopy(default)  # options come from arguments, else a given config, else the model's own
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
    if own_loop is not None:
        for name in ("num_beams", "num_return_sequences"):
            if (getattr(merged, name) or 1) > 1:
                raise ValueError(f"{name}={getattr(merged, name)}: {own_loop} follows one text a prompt; expected 1")
        for name in ("inputs_embeds", "position_ids", "token_type_ids"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name}: {own_loop} needs input_ids and makes positions of its own; expected none")
        refused = ["output_attentions", "output_hidden_states"]
        refused += ["output_scores", "output_logits"] if own_loop == "verification" else []
        for name in refused:
            if merged.return_dict_in_generate and getattr(merged, name):
                raise ValueError(f"{name}=True: {own_loop} runs tokens as drafts, checks or again; expected False")
    decoding = merged.get_generation_mode(kwargs.get("assistant_model"))
    if decoding not in _ALLOWED:
        allowed = ", ".join(sorted(mode.value for mode in _ALLOWED))
        raise ValueError(f"{decoding.value} is not supported with pruning; supported: {allowed}")
