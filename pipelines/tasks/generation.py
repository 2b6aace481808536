"""Generation tasks: continue a prompt, compare the text with a reference by ROUGE."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import TypeVar

import torch
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from torch import Tensor

import griffin
from griffin import Method, Row
from pipelines.config import RunConfig
from pipelines.methods import engine_for
from pipelines.models import LoadedModel
from pipelines.records import Sample
from pipelines.tasks import drafting
from pipelines.tasks.answers import DecodingCost, scored_metrics
from pipelines.tasks.assisted import Assisted
from pipelines.tasks.grouping import BATCHES, begun, groups
from pipelines.tasks.prompts import Prompt, read_prompts

P = TypeVar("P", bound=Prompt)

ROUGE = ("rouge1", "rouge2", "rougeL")

# Of `task.decoding=reference_sampling`: the reference implementation's scripts sample from the whole vocabulary.
TEMPERATURE = 0.3

# A prompt goes on from a prefix where it is less than so many times as long. Attention to a chunk and what comes before
# it has no shortcut for its causal mask, and in the end that costs what the prefix saves (measured on a CPU).
WORTH = 8

# rouge-score with its defaults, no stemming: F-scores, printed times 100 as the field does.
_scorer = RougeScorer(ROUGE, tokenizer=DefaultTokenizer(use_stemmer=False))


def read(config: RunConfig) -> list[Prompt]:
    """The task's prompts, built from its data.

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
    """Generate, and score by ROUGE, what comes before the stop text."""
    stop = config.task.stop

    def scored(prompt: Prompt, text: str) -> Sample:
        before = text.partition(stop)[0]
        scores = _scorer.score(target=prompt.reference, prediction=before)
        return {name: 100 * scores[name].fmeasure for name in ROUGE} | {"text": before, "reference": prompt.reference}

    return generate(loaded, prompts, config, methods, done, lambda text: stop in text, scored)


def generate(
    loaded: LoadedModel,
    prompts: Sequence[P],
    config: RunConfig,
    methods: Sequence[Method],
    done: dict[Method, set[int]],
    whole: Callable[[str], bool],
    scored: Callable[[P, str], Sample],
) -> Iterator[tuple[Method, list[Sample]]]:
    """Generate and score: every prompt runs dense once, and each method continues it as a row of a batch.

    Prompts are taken by length, the longest first, so that little of a batch is padding and what does not fit into
    memory fails at once. A prompt that leaves no room for `max_new_tokens` in the model's context is not run and says
    so, as in the reference implementation.

    Args:
        loaded: the model.
        prompts: what is continued.
        config: of the run.
        methods: all methods of the call.
        done: of each, the prompts that it has continued before.
        whole: whether a text is whole, so that what comes behind would be cut.
        scored: what a sample says of the text of a prompt.
    """
    ended = _ended(loaded, whole)
    tokenizer = loaded.tokenizer

    def sample(prompt: P, prompt_tokens: int, tokens: Sequence[int], seconds: float) -> Sample:
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        counts = {"generated_tokens": len(tokens), "seconds": round(seconds, 4)}
        return _sample(prompt, prompt_tokens) | counts | scored(prompt, text)

    room = loaded.context_length - config.task.max_new_tokens
    encoded = {prompt.index: loaded.encode(prompt.text, config.task.chat_template, prompt.said) for prompt in prompts}
    fitting = [prompt for prompt in prompts if len(encoded[prompt.index]) <= room]
    if config.batch_size > 1:
        fitting.sort(key=lambda prompt: (-len(encoded[prompt.index]), prompt.index))
    for prompt in prompts:
        ids = encoded[prompt.index]
        if len(ids) > room:
            for method in methods:
                if prompt.index not in done[method]:
                    yield method, [_sample(prompt, len(ids)) | {"skipped": f"longer than {room} tokens"}]
    if config.assistance != "none":
        (method,) = methods
        model = Assisted(loaded, config)
        for prompt in fitting:
            if prompt.index not in done[method]:
                text = model.generate(encoded[prompt.index], ended)
                part = drafting.sample_part([text.drafts], model.step_bytes)
                yield method, [sample(prompt, len(encoded[prompt.index]), text.tokens, text.seconds) | part]
        return
    engine = engine_for(loaded.model, methods, config)
    cost = DecodingCost(engine, methods)
    prompts_run = _Prompts(engine, methods, encoded, loaded, prompts[0].beginning if prompts else "")
    generation = _generation(config, ended)
    for group, run in groups(fitting, methods, config, done, BATCHES):
        for rows, size in begun(engine, group, run, config, prompts_run.prefilled):
            # A compiled graph is for one shape of the cache, so it has the room that the longest of all prompts needs.
            longest = max(map(len, encoded.values()))
            with closing(griffin.decode(engine, rows, generation, batch_size=size, max_prompt_tokens=longest)) as ends:
                for row in ends:
                    if row.label.index not in done[row.method]:
                        seconds = row.seconds + prompts_run.seconds[row.label.index] / len(methods)
                        part = cost.sample_part(row.method, [row])
                        yield row.method, [sample(row.label, row.state.length, row.tokens, seconds) | part]


def metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """ROUGE F-scores x 100 with standard errors, counts, and what answers took, over all samples of a run."""
    return scored_metrics(samples, ROUGE)


class _Prompts:
    """Runs the prompts of a task; what all begin with runs once.

    Args:
        engine: the model.
        methods: all methods of the call.
        encoded: token ids of each prompt, by its index.
        loaded: the model and its tokenizer.
        beginning: what all prompts begin with.

    Attributes:
        seconds: what the dense pass over each prompt took, by the prompt's index.
    """

    def __init__(
        self,
        engine: griffin.Engine,
        methods: Sequence[Method],
        encoded: dict[int, list[int]],
        loaded: LoadedModel,
        beginning: str,
    ) -> None:
        self._engine, self._encoded, self._record = engine, encoded, griffin.wanted(methods)
        self._likely = any(method.prunes_vocabulary for method in methods)
        # The last token may be another one where an article follows.
        self._beginning = loaded.encode(beginning)[:-1]
        self._prefix: griffin.PromptState | None = None
        self.seconds: dict[int, float] = {}

    def prefilled(self, prompt: Prompt) -> griffin.PromptState:
        """The prompt, after it has run dense."""
        began = time.perf_counter()
        if self._prefix is None and self._beginning:
            (self._prefix,) = griffin.prefill(self._engine, [self._beginning], self._record, likely_tokens=self._likely)
        ids = self._encoded[prompt.index]
        (state,) = griffin.prefill(
            self._engine, [ids], self._record, prefix=self._shared_prefix(ids), likely_tokens=self._likely
        )
        self.seconds[prompt.index] = time.perf_counter() - began
        return state

    def _shared_prefix(self, ids: Sequence[int]) -> griffin.PromptState | None:
        """What a prompt goes on from, where that pays."""
        if self._prefix is None:
            return None
        length = self._prefix.length
        pays = length < len(ids) < length * WORTH and tuple(ids[:length]) == self._prefix.ids
        return self._prefix if pays else None


def _generation(config: RunConfig, ended: Callable[[Sequence[int]], bool]) -> griffin.Generation:
    """The task's way to pick tokens. An end token counts as one."""
    if config.task.decoding == "reference_sampling":
        return sampled(config.seed, config.task.max_new_tokens, lambda row: ended(row.tokens))
    return griffin.Generation(config.task.max_new_tokens, lambda row: ended(row.tokens))


def _ended(loaded: LoadedModel, whole: Callable[[str], bool]) -> Callable[[Sequence[int]], bool]:
    """Whether a text with these tokens is done: by an end token, or because it is whole."""
    ends, tokenizer = end_tokens(loaded), loaded.tokenizer
    return lambda tokens: tokens[-1] in ends or whole(tokenizer.decode(tokens, skip_special_tokens=True))


def end_tokens(loaded: LoadedModel) -> set[int]:
    """The tokens that end a generation of this model."""
    eos = loaded.model.generation_config.eos_token_id
    return {*(eos if isinstance(eos, list) else [] if eos is None else [eos])}


def sampled(
    seed: int, limit: int, ended: Callable[[Row], bool], temperature: float = TEMPERATURE
) -> griffin.Generation:
    """Sampling from the whole vocabulary, every row with random numbers of its own.

    The numbers follow from seed and prompt. So a text depends neither on the texts beside it nor on those before it,
    and methods are compared with the same numbers.

    Args:
        seed: of the numbers.
        limit: the most new tokens of a row.
        ended: whether a row that got its newest token is done.
        temperature: what logits are divided by.
    """
    numbers: dict[Row, torch.Generator] = {}

    def draw(row: Row, chances_V: Tensor) -> Tensor:
        if row not in numbers:
            own = zlib.crc32(f"{seed} {row.label.index}".encode())
            numbers[row] = torch.Generator(chances_V.device).manual_seed(own)
        return chances_V.multinomial(1, generator=numbers[row])

    def colder(rows: Sequence[Row], drafted: Sequence[Tensor | None], logits_BV: Tensor) -> Tensor:
        return logits_BV / temperature

    return griffin.Generation(limit, ended, colder, draw)


def _sample(prompt: Prompt, prompt_tokens: int) -> Sample:
    return {"index": prompt.index, "id": prompt.id, "prompt_tokens": prompt_tokens}
