"""Generation tasks: continue a prompt, compare the text with a reference by ROUGE.

Also transformers' assisted generation, as what verified decoding is compared with: drafts that are looked up in the
prompt, or that a smaller model writes. Its drafts, checks and bytes are counted as ours are.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

import griffin
from griffin import Method, Row
from pipelines.config import RunConfig
from pipelines.errors import UserError
from pipelines.models import LoadedModel, load
from pipelines.records import Sample
from pipelines.tasks.answers import decoding_part, drafting_part, scored_metrics
from pipelines.tasks.prompts import BATCHES, Batches, Evaluation, P, Prompt, fitting
from pipelines.tasks.prompts import read as read

# A prompt, how it was continued, the new tokens, their seconds, and what its sample says of how they were decoded.
Texts = Iterator[tuple[P, Method, Sequence[int], float, Sample]]

ROUGE = ("rouge1", "rouge2", "rougeL")

# Of `task.decoding=reference_sampling`: the reference implementation's scripts sample from the whole vocabulary.
TEMPERATURE = 0.3

# A prompt goes on from a prefix where it is less than so many times as long. Attention to a chunk and what comes before
# it has no shortcut for its causal mask, and in the end that costs what the prefix saves (measured on a CPU).
WORTH = 8

# Tokens that are looked up at a time where `draft_tokens=auto`, as in the method's own examples; a model drafts as
# transformers would have it.
LOOKED_UP = 10

# rouge-score with its defaults, no stemming: F-scores, printed times 100 as the field does.
_scorer = RougeScorer(ROUGE, tokenizer=DefaultTokenizer(use_stemmer=False))


def evaluate(run: Evaluation, prompts: Sequence[Prompt]) -> Batches:
    """Generate, and score by ROUGE, what comes before the stop text."""
    stop = run.config.task.stop

    def scored(prompt: Prompt, text: str) -> Sample:
        before = text.partition(stop)[0]
        scores = _scorer.score(target=prompt.reference, prediction=before)
        return {name: 100 * scores[name].fmeasure for name in ROUGE} | {"text": before, "reference": prompt.reference}

    return generate(run, prompts, lambda text: stop in text, scored)


def metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """ROUGE F-scores x 100 with standard errors, counts, and what answers took, over all samples of a run."""
    return scored_metrics(samples, ROUGE)


def generate(
    run: Evaluation, prompts: Sequence[P], whole: Callable[[str], bool], scored: Callable[[P, str], Sample]
) -> Batches:
    """Generate and score: every prompt runs dense once, and each method continues it as a row of a batch.

    Prompts are taken by length, the longest first, so that little of a batch is padding and what does not fit into
    memory fails at once. A text that is `whole` has ended: what comes behind would be cut. Samples say of it what is
    `scored`.
    """
    decode, ends = partial(run.loaded.tokenizer.decode, skip_special_tokens=True), end_tokens(run.loaded)
    encoded, skipped = fitting(run, prompts)
    yield from skipped

    def ended(tokens: Sequence[int]) -> bool:
        return tokens[-1] in ends or whole(decode(tokens))

    texts = _continued if run.config.assistance == "none" else _assisted
    for prompt, method, tokens, seconds, part in texts(run, encoded, ended):
        sample = _sample(prompt, encoded[prompt], tokens, seconds)
        yield method, [sample | scored(prompt, decode(tokens)) | part]


def _continued(run: Evaluation, encoded: dict[P, list[int]], ended: Callable[[Sequence[int]], bool]) -> Texts[P]:
    """The texts of rows of batches. What all prompts begin with runs once."""
    config, prompts = run.config, [*encoded]
    # The last token may be another one where an article follows.
    beginning = run.loaded.encode(prompts[0].beginning)[:-1] if prompts else []
    prefixes: list[griffin.PromptState] = []

    def prefilled(prompt: P) -> griffin.PromptState:
        ids, length = encoded[prompt], len(beginning)
        if beginning and not prefixes:
            prefixes.append(run.prefill(beginning))
        pays = length < len(ids) < length * WORTH and ids[:length] == beginning
        return run.prefill(ids, prefixes[0] if pays else None)

    if config.batch_size > 1:
        prompts.sort(key=lambda prompt: (-len(encoded[prompt]), prompt.index))
    temperature = TEMPERATURE if config.task.decoding == "reference_sampling" else 0.0
    generation = picking(config, config.task.max_new_tokens, lambda row: ended(row.tokens), temperature)
    # A compiled graph is for one shape of the cache, so it has the room that the longest of all prompts needs.
    longest = max(map(len, encoded.values()), default=0)
    for group, methods in run.groups(prompts, BATCHES):
        for row, seconds in run.generated(group, methods, prefilled, generation, longest):
            yield row.label, row.method, row.tokens, seconds, decoding_part(row, run)


def end_tokens(loaded: LoadedModel) -> set[int]:
    """The tokens that end a generation of this model. In a text, one counts as a token."""
    eos = loaded.model.generation_config.eos_token_id
    return {*(eos if isinstance(eos, list) else [] if eos is None else [eos])}


def picking(
    config: RunConfig, max_new_tokens: int, ended: Callable[[Row], bool], temperature: float
) -> griffin.Generation:
    """Greedy decoding, or, above temperature 0, sampling from the whole vocabulary.

    Every row has random numbers of its own, which follow from seed and prompt. So a text depends neither on the texts
    beside it nor on those before it, and methods are compared with the same numbers.
    """
    if not temperature:
        return griffin.Generation(max_new_tokens, ended)
    numbers: dict[Row, torch.Generator] = {}

    def draw(row: Row, chances_V: Tensor) -> Tensor:
        if row not in numbers:
            own = zlib.crc32(f"{config.seed} {row.label.index}".encode())
            numbers[row] = torch.Generator(chances_V.device).manual_seed(own)
        return chances_V.multinomial(1, generator=numbers[row])

    def colder(rows: Sequence[Row], drafted: Sequence[Tensor | None], logits_BV: Tensor) -> Tensor:
        return logits_BV / temperature

    return griffin.Generation(max_new_tokens, ended, colder, draw)


def _sample(prompt: Prompt, ids: Sequence[int], tokens: Sequence[int], seconds: float) -> Sample:
    took = {"generated_tokens": len(tokens), "seconds": round(seconds, 4)}
    return prompt.sample_part(ids) | {"prompt": prompt.text} | took


# -- transformers' assisted generation ---------------------------------------------------------------------------------


def _assisted(run: Evaluation, encoded: dict[P, list[int]], ended: Callable[[Sequence[int]], bool]) -> Texts[P]:
    """The texts of prompts, one by one: greedy, until the new tokens are a whole text. UserError where the assistant
    cannot be loaded, or has other tokens."""
    (method,) = run.methods
    model: Any = griffin.view_of(run.loaded.model)
    checked, step_bytes = _counted(model), _step_bytes(model)
    assistant = _assistant(run.loaded, run.config) if run.config.assistant else None
    drafted, draft_bytes = (_counted(assistant), _step_bytes(assistant)) if assistant else (list[int](), 0)
    looked_up = LOOKED_UP if run.config.draft_tokens == "auto" else run.config.draft_tokens
    by = {"assistant_model": assistant} if assistant else {"prompt_lookup_num_tokens": looked_up}
    for prompt, ids in encoded.items():
        if not run.lacks(method, prompt):
            continue
        ids_1S = torch.tensor([ids], device=model.device)
        checked.clear()
        drafted.clear()
        began = time.perf_counter()
        sequences_1S = model.generate(
            ids_1S,
            attention_mask=torch.ones_like(ids_1S),
            max_new_tokens=run.config.task.max_new_tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([_Ended(len(ids), ended)]),
            **by,
        )
        seconds = time.perf_counter() - began
        tokens = sequences_1S[0, len(ids) :].tolist()
        while len(tokens) > 1 and ended(tokens[:-1]):  # the last round may have gone on behind the text's end
            del tokens[-1]
        # The prompt runs with the first drafts: its step is no more a check than that of an unassisted prompt, so
        # the first round counts by its drafts alone, and the first token not at all.
        rounds = [checked[0] - len(ids), *(count - 1 for count in checked[1:])]
        widths, emitted = [count + 1 for count in rounds[rounds[0] == 0 :]], len(tokens) - 1 + (rounds[0] > 0)
        drafts = griffin.DraftStatistics(
            widths=widths,
            drafted=sum(rounds),
            accepted_by_check=[emitted - len(widths)],  # of all: transformers does not tell them apart
            emitted=emitted,
            draft_bytes=len(drafted) * draft_bytes,
        )
        yield prompt, method, tokens, seconds, drafting_part([drafts], step_bytes, run.check_costs)


class _Ended(StoppingCriteria):
    """The same end of a text for `generate`."""

    def __init__(self, prompt_tokens: int, ended: Callable[[Sequence[int]], bool]) -> None:
        self._prompt_tokens, self._ended, self._asked = prompt_tokens, ended, 0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        new = input_ids[0, self._prompt_tokens :].tolist()
        done = any(self._ended(new[:count]) for count in range(self._asked + 1, len(new) + 1))
        self._asked = len(new)
        return torch.tensor([done], device=input_ids.device)


def _assistant(loaded: LoadedModel, config: RunConfig) -> Any:
    """The small model that drafts."""
    settings = replace(config.model, name="assistant", repo=config.assistant)
    small = load(settings, config.device, config.seed, onednn=config.cpu_onednn)
    if small.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
        raise UserError(f"assistant={config.assistant}: expected a model with the tokens of {config.model.name}")
    if config.draft_tokens != "auto":
        small.model.generation_config.num_assistant_tokens = config.draft_tokens
        small.model.generation_config.assistant_confidence_threshold = 0.0
    return small.model


def _counted(model: nn.Module) -> list[int]:
    """A list that grows by the positions of each forward call of a model."""
    calls: list[int] = []

    def before(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        calls.append(options["input_ids"].shape[1])

    model.register_forward_pre_hook(before, with_kwargs=True)
    return calls


def _step_bytes(model: nn.Module) -> int:
    widths = [block.width for block in griffin.find_feedforward_blocks(model)]
    return griffin.traffic(model, widths).dense
