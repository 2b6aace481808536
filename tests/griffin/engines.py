"""How the tests run prompts and rows on an engine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import reference
import torch
from families import REFRESHED, tiny
from running import TOLERANCE, difference
from torch import Tensor
from transformers import PreTrainedModel

import griffin
from griffin import Engine, Experts, Generation, Method, PromptState, Row, refresh, ridge, wanted

Text = tuple[list[int], Tensor]


def prefilled(engine: Engine, ids: Sequence[int], *methods: Method, **options: Any) -> PromptState:
    """The state of one prompt, from which these methods can choose."""
    likely = {"likely_tokens": any(method.prunes_vocabulary for method in methods)}
    (state,) = griffin.prefill(engine, [ids], wanted(methods), **(likely | options))
    return state


def begun(engine: Engine, ids: Sequence[int], method: Method, label: Any = None) -> Row:
    """The row of a prompt and a method."""
    (row,) = griffin.begin(engine, [prefilled(engine, ids, method)], method, labels=[label])
    return row


def chosen(engine: Engine, state: PromptState, method: Method) -> Experts:
    """The experts of a prompt."""
    experts = griffin.choose(engine, [state], method)
    assert experts is not None
    return experts


def scored(engine: Engine, row: Row, ids: Sequence[int]) -> Tensor:
    """The logits [C, V] of one row along a text."""
    ((_, logits_CV),) = griffin.score(engine, [(row, ids)])
    return logits_CV


def uncompiled(module: Any) -> Any:
    """Has an engine decode as it does where it compiles: on caches of static shapes, reading tokens ahead."""
    return module


def generated(
    engine: Engine,
    rows: Iterable[Row],
    limit: int,
    *,
    most: int = 1,
    longest: int = 0,
    ended: Callable[[Row], bool] = lambda row: False,
) -> dict[Any, Text]:
    """By label, the tokens of each row, and the logits [N, V] that they were picked from."""
    picked: dict[Row, list[Tensor]] = defaultdict(list)

    def keep(rows: Sequence[Row], drafted: Any, logits_BV: Tensor) -> Tensor:
        for row, logits_V in zip(rows, logits_BV, strict=True):
            picked[row].append(logits_V.clone())
        return logits_BV

    texts = griffin.decode(engine, rows, Generation(limit, ended, keep), batch_size=most, max_prompt_tokens=longest)
    return {row.label: (row.tokens, torch.stack(picked[row][: len(row.tokens)])) for row in texts}


def refuse_parting(found: Text, expected: Text) -> None:
    """Refuse texts that differ, or logits that differ by more than rounding. There are no ties of random weights."""
    assert found[0] == expected[0]
    assert difference(found[1], expected[1]) < TOLERANCE


@torch.no_grad()
def refuse_inexact(model: PreTrainedModel, ids: Sequence[int], text: Sequence[int]) -> None:
    """Refuse a text with a token that is not the dense model's best one there, but for rounding."""
    logits_TV = model(torch.tensor([[*ids, *text]]), use_cache=False).logits[0, len(ids) - 1 : -1]
    chosen_T = logits_TV.gather(1, torch.tensor(text).unsqueeze(1)).squeeze(1)
    assert bool((chosen_T >= logits_TV.max(dim=-1).values - 1e-5 * logits_TV.abs().max()).all())


def ridge_solution(family: str, text: list[int], length: int, kept_K: Tensor, layer: int) -> Tensor:
    """[K, H], by the formula: what the kept neurons are to write too, of a prompt and what was generated behind it."""
    _, z = reference.run(tiny(family), family, torch.tensor([text]))
    weights_HD = reference.output_matrix(tiny(family), family, layer)
    unit_SD = z[layer] / z[layer].norm(dim=-1, keepdim=True)
    prompt_rows = torch.stack([unit_SD[i : min(i + 2, length)].sum(dim=0) for i in range(0, length, 2)])[-ridge.ROWS :]
    rows_TD = torch.cat([prompt_rows, refresh.WEIGHT**0.5 * unit_SD[length:]])
    dropped_D = torch.ones(rows_TD.shape[1], dtype=torch.bool).index_fill_(0, kept_K, False)
    penalty = ridge.RIDGE * prompt_rows[:, kept_K].square().sum() / len(kept_K)
    gram_KK = rows_TD[:, kept_K].T @ rows_TD[:, kept_K] + penalty * torch.eye(len(kept_K)).double()
    return torch.linalg.solve(gram_KK, rows_TD[:, kept_K].T @ (rows_TD[:, dropped_D] @ weights_HD[:, dropped_D].T))


# Beside each other in one batch.
BATCHED = [
    *(Method(sparsity=0.0), Method(), Method("wanda", sparsity=0.75), Method("random", "sample")),
    *(Method("magnitude", sparsity=(0.5, 0.0, 0.9)), Method("joint", compensation="ridge", budget="late")),
    *(Method(compensation="ridge"), Method(**REFRESHED), Method("wanda", **REFRESHED)),
]
LIMIT = 14
LEARNING = [("none", "none"), ("ridge", "none"), ("ridge", "compensation")]
PERFECT = {"statistic": "wanda", "draft_vocabulary": "full"}  # in a model of which half is idle


def verified(learning: tuple[str, str] = ("none", "none"), **options: Any) -> Method:
    """A method whose draft learns so."""
    return Method(compensation=learning[0], refresh=learning[1], **({"verification": "exact"} | options))


def decoded(engine: Engine, row: Row, limit: int = LIMIT, **options: Any) -> list[int]:
    """The tokens of one row."""
    assert list(griffin.decode(engine, [row], Generation(limit, **options))) == [row]
    return row.tokens
