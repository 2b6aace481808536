"""Generation tasks: continue a prompt, compare the text with a reference by ROUGE."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import partial

import torch
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from torch import Tensor

import griffin
from griffin import Row
from pipelines.config import RunConfig
from pipelines.models import LoadedModel
from pipelines.records import Sample
from pipelines.tasks.answers import decoding_part, scored_metrics
from pipelines.tasks.assisted import assisted
from pipelines.tasks.grouping import BATCHES, Batches, Evaluation
from pipelines.tasks.prompts import P, Prompt, Texts, fitting
from pipelines.tasks.prompts import read as read

ROUGE = ("rouge1", "rouge2", "rougeL")

# Of `task.decoding=reference_sampling`: the reference implementation's scripts sample from the whole vocabulary.
TEMPERATURE = 0.3

# A prompt goes on from a prefix where it is less than so many times as long. Attention to a chunk and what comes before
# it has no shortcut for its causal mask, and in the end that costs what the prefix saves (measured on a CPU).
WORTH = 8

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

    texts = _continued if run.config.assistance == "none" else assisted
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
            yield row.label, row.method, row.tokens, seconds, decoding_part(row, run.traffic.get(row.method))


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
    return prompt.sample_part(ids) | {"generated_tokens": len(tokens), "seconds": round(seconds, 4)}
