"""Flocking: within one text the same FF neurons are relatively strong, token after token (arXiv 2404.01365).

Every sequence runs through the dense model three times: as it is, with its tokens permuted, and as many tokens drawn
at random. GRIFFIN's statistic gives each its top-k set of neurons, layer by layer. How alike these sets are between
sequences, between the halves of one, and between a prompt and what the model continues it with, is what pruning by
the prompt lives on.

Dimensions: S = tokens, D = FF width, L = layers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import griffin
from griffin import DENSE, Row
from pipelines.config import RunConfig
from pipelines.data import read_rows, read_text_file
from pipelines.errors import UserError
from pipelines.figure_style import save, styled
from pipelines.methods import engine_for
from pipelines.models import LoadedModel
from pipelines.records import Sample, writing
from pipelines.tasks.answers import sample_counts
from pipelines.tasks.flocking_figures import TEXTS, figures, jaccard, layer_table, overall
from pipelines.tasks.generation import end_tokens
from pipelines.tasks.prompts import Batches, Evaluation, Prompt, need_context
from pipelines.tracking import Media

_SEQUENCES = 16  # without a limit
_SHORTEST = 16  # tokens; the halves of less say nothing
_HEATMAPS = 2  # sequences whose relative activations are kept


@dataclass(frozen=True)
class Text(Prompt):
    """A sequence: a row of its own, or the stretch with this number of a long text."""

    stretch: bool = False


def read(config: RunConfig) -> list[Text]:
    """Sequences; without a limit, 16 at most."""
    task, count = config.task, config.limit or _SEQUENCES
    if task.data_files is not None and Path(task.data_files).suffix != ".jsonl":
        text = read_text_file(task.data_files)
        return [Text(index, str(index), text, stretch=True) for index in range(config.offset, config.offset + count)]
    rows = read_rows(task, (task.text_field,), count, config.offset)
    return [Text(index, name, row[task.text_field]) for index, name, row in rows]


def evaluate(run: Evaluation, texts: Sequence[Text]) -> Batches:
    """Measure one sequence after another."""
    loaded, config, task = run.loaded, run.config, run.config.task
    (method,) = run.methods
    try:
        widths = {block.width for block in griffin.find_feedforward_blocks(loaded.model)}
    except griffin.UnsupportedModelError as error:
        raise UserError(f"model={config.model.name}: {error}") from error
    if len(widths) > 1:
        raise UserError(f"model={config.model.name}: layers of different widths {sorted(widths)}; flocking takes one")
    need_context(run, sequence_length=task.sequence_length, max_new_tokens=task.max_new_tokens)
    for text, ids in _tokenized(loaded, texts, config):
        if not run.lacks(method, text):
            continue
        began = time.perf_counter()
        sample = text.sample_part(ids)
        if len(ids) < _SHORTEST:
            yield method, [sample | {"skipped": f"shorter than {_SHORTEST} tokens"}]
            continue
        sample |= _measure(loaded, ids, config, text.index)
        yield method, [sample | {"seconds": round(time.perf_counter() - began, 4)}]


def metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Means over layers, with standard errors: `jaccard_sequences_natural`, `jaccard_halves_permuted`, ..."""
    measured = [sample for sample in samples if "skipped" not in sample]
    return overall(measured) | sample_counts(samples)


def media(folder: Path, samples: Sequence[Sample], config: RunConfig) -> Media:
    """The measures by layer as CSV and, for W&B, the figures as PNG and PDF, into the run folder."""
    measured = sorted((sample for sample in samples if "skipped" not in sample), key=lambda sample: sample["index"])
    if not measured:
        return Media()
    rows = layer_table(measured)
    lines = [",".join(rows[0]), *(",".join(str(value) for value in row.values()) for row in rows)]
    with writing(folder):
        (folder / "layers.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        if config.wandb.mode == "disabled":  # a report draws them
            return Media()
        with styled():
            plans = figures(measured, rows, config.task.kept)
            images = [save(draw(), folder / "figures" / "_".join(words)) for words, _, draw in plans]
    return Media(images, {"layers": rows})


def _tokenized(loaded: LoadedModel, texts: Sequence[Text], config: RunConfig) -> Iterator[tuple[Text, list[int]]]:
    length = config.task.sequence_length
    if not texts[0].stretch:
        for text in texts:
            yield text, loaded.encode(text.text)[:length]
        return
    ids = loaded.tokenizer(texts[0].text, add_special_tokens=False)["input_ids"]
    bos = [loaded.tokenizer.bos_token_id] if loaded.add_bos_token else []
    if len(ids) < length:
        raise UserError(
            f"task.data_files={config.task.data_files}: the text has {len(ids)} tokens, expected at least {length}, "
            "which is task.sequence_length"
        )
    # Evenly over the text, so that the sequences are about different things.
    count = min(texts[-1].index + 1, len(ids) // length)
    if texts[0].index >= count:
        raise UserError(f"offset={config.offset}: expected less than {count}, the sequences that the text has")
    for text in (text for text in texts if text.index < count):
        start = text.index * (len(ids) // count)
        yield text, (bos + ids[start : start + length])[:length]


def _measure(loaded: LoadedModel, ids: list[int], config: RunConfig, index: int) -> Sample:
    """One sequence and its controls; every list has one number per layer."""
    measures = ("jaccard_halves", "jaccard_generation", "kept_energy", "token_energy")
    sample: Sample = {"arrays": {}} | {name: {} for name in measures}
    for text, tokens in zip(TEXTS, (ids, *_controls(loaded, ids, config.seed, index)), strict=True):
        keep = index < (_HEATMAPS if text == "natural" else 1)
        steps = config.task.max_new_tokens if text == "natural" else 0
        seen = _run(loaded, tokens, config, steps, keep)
        layers = {name: np.stack([calls[0][name] for calls in seen]) for name in seen[0][0]}
        if steps:
            squares = [np.sum([call["squares"] for call in calls[1:]], axis=0) for calls in seen]
            generation = [_top(torch.from_numpy(square_D), config.task.kept) for square_D in squares]
            layers["sets_generation"] = np.stack(generation)
            sample["jaccard_generation"][text] = _numbers(jaccard(layers["sets"], layers["sets_generation"]))
        sample["jaccard_halves"][text] = _numbers(jaccard(layers["sets_first"], layers["sets_second"]))
        for name, values in layers.items():
            if name in measures:
                sample[name][text] = _numbers(values)
            else:
                sample["arrays"][f"{text}_{name}"] = np.packbits(values, axis=-1) if "sets" in name else values
    return sample


def _run(loaded: LoadedModel, ids: list[int], config: RunConfig, steps: int, heatmap: bool) -> list[list[Any]]:
    """What was seen of the prompt, then of each of `steps` tokens that the dense model continues it with greedily.

    End tokens are not taken, so that every generation has the same length.
    """
    task = config.task

    def look(layer: int, z_SD: Tensor) -> dict[str, Any]:
        relative_SD = griffin.relative_activations(z_SD)
        squares_SD = relative_SD.square()
        if len(z_SD) == 1:
            return {"squares": squares_SD[0].cpu().numpy()}
        total_D, half = squares_SD.sum(dim=0), len(z_SD) // 2
        kept_D = _top(total_D, task.kept)
        count = int(kept_D.sum())
        crop_TM = relative_SD[: task.heatmap_tokens, : task.heatmap_neurons]
        return {
            "sets": kept_D,
            "sets_first": _top(squares_SD[:half].sum(dim=0), task.kept),
            "sets_second": _top(squares_SD[half:].sum(dim=0), task.kept),
            "scores": total_D.sqrt().cpu().numpy(),
            "kept_energy": float(squares_SD[:, torch.from_numpy(kept_D).to(z_SD.device)].sum() / len(z_SD)),
            "token_energy": float(squares_SD.topk(count, dim=-1).values.sum() / len(z_SD)),
            **({"heatmap": crop_TM.cpu().numpy().astype(np.float16)} if heatmap else {}),
        }

    ends = sorted(end_tokens(loaded))

    def without_ends(rows: Sequence[Row], drafted: Sequence[Tensor | None], logits_BV: Tensor) -> Tensor:
        logits_BV[:, ends] = -torch.inf
        return logits_BV

    view, seen = griffin.record_activations(loaded.model, look)
    engine = engine_for(view, [], config)
    (state,) = griffin.prefill(engine, [ids], [])
    if steps:
        rows = griffin.begin(engine, [state], DENSE)
        # The last token that is picked does not run.
        list(griffin.decode(engine, rows, griffin.Generation(steps + 1, process_logits=without_ends)))
    return seen


def _controls(loaded: LoadedModel, ids: list[int], seed: int, index: int) -> tuple[list[int], list[int]]:
    """The same tokens in random order, and tokens drawn at random; a BOS token stays in front."""
    numbers = torch.Generator().manual_seed(seed * 1_000_003 + index)
    bos, rest = (ids[:1], ids[1:]) if loaded.add_bos_token else ([], ids)
    permuted = [rest[place] for place in torch.randperm(len(rest), generator=numbers).tolist()]
    special = set(loaded.tokenizer.all_special_ids)
    vocabulary = min(len(loaded.tokenizer), loaded.model.get_input_embeddings().weight.shape[0])
    allowed = torch.tensor([token for token in range(vocabulary) if token not in special])
    drawn = allowed[torch.randint(0, len(allowed), (len(rest),), generator=numbers)].tolist()
    return bos + permuted, bos + drawn


def _top(squares_D: Tensor, kept: float) -> np.ndarray:
    """[D] boolean: the top-k set; squares order neurons as scores do."""
    chosen = torch.zeros(len(squares_D), dtype=torch.bool)
    chosen[squares_D.topk(griffin.kept_neurons(len(squares_D), 1 - kept)).indices.cpu()] = True
    return chosen.numpy()


def _numbers(values: Any) -> list[float]:
    return [round(float(value), 6) for value in values]
