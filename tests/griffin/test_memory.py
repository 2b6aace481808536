"""Prompt after prompt, nothing is left behind, nor after an error; and a prompt's memory goes when its text begins.

Nothing here collects garbage: what is no longer used must go at once, since on a GPU it may be gigabytes.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator
from typing import Any
from weakref import ref

import pytest
import torch
from engines import begun, generated, prefilled, scored, verified
from families import REFRESHED, prompt, tiny, tokens
from running import failing, text
from torch import Tensor, nn

import griffin
from griffin import Engine, Generation, Method, Row, begin, decode

pytestmark = pytest.mark.usefixtures("no_collector")
METHODS = [
    *(Method(), Method(compensation="ridge"), Method("joint", **REFRESHED)),
    verified(("ridge", "compensation"), draft_tokens=4),
    verified(("ridge", "compensation"), draft_tokens=4, draft_vocabulary="full"),
]
LIMIT = 10  # one refresh


def held() -> tuple[int, int]:
    """How many tensors there are, and how many bytes their storages have."""
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return len(tensors), sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("keeps", [False, True])
def test_nothing_grows_with_the_number_of_prompts_and_what_grows_would_tell(keeps: bool, compiler: Any) -> None:
    engine, found, kept = Engine(tiny("llama"), compiler=compiler), [], []
    for number in range(12):
        state = prefilled(engine, tokens(9, number), *METHODS)
        rows = [begin(engine, [state], method, labels=[method])[0] for method in METHODS]
        generated(engine, rows, LIMIT, most=1 + number % 2)
        shared = begin(engine, [state, prefilled(engine, tokens(12, 1), *METHODS)], METHODS[2], labels=[0, 1])
        generated(engine, shared, LIMIT, most=2)
        scored(engine, begun(engine, tokens(9, number), METHODS[2]), tokens(LIMIT))
        kept += [state] if keeps else []
        del state, rows, shared
        found += [held()] if number in (3, 11) else []
    assert (found[0] == found[1]) != keeps


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"offload_dense": True}, {"mode": "masked"}], ids=str)
def test_nor_with_caches_of_prompts_that_live_no_more(options: dict[str, Any]) -> None:
    model, found = tiny("llama"), []
    with griffin.prune(model, compensation="ridge", **options):
        for number in range(12):
            cache = model(prompt(9, number), use_cache=True).past_key_values
            model(torch.tensor([[5]]), past_key_values=cache, use_cache=True)
            del cache
            found += [held()] if number in (3, 11) else []
    assert found[0] == found[1]


# Three layers; a prompt of 600 tokens. Its keys and values, and what ridge compensation records of it, in bytes:
CACHE, RECORDED = 3 * 2 * 600 * 16 * 4, 3 * 300 * (80 + 32) * 4


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
@pytest.mark.parametrize("way", ["engine", "prune"])
def test_while_a_text_is_generated_its_prompts_statistics_and_cache_are_gone(way: str, method: Method) -> None:
    """But for statistics that are to be refreshed, what a fit knows, and the one cache that is decoded from."""
    model, steps, peaks, before = tiny("mistral"), 0, [], held()[1]

    def look(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 5 and number in (1, 5, 9):
            peaks.append(held()[1] - before)
        return arguments[-1]

    def coming(number: int) -> Iterator[Row]:
        yield begun(engine, tokens(600, number), method)

    engine, pruner = Engine(model), griffin.prune(model, method)
    with pruner:
        for number in range(10):
            steps = 0
            if way == "engine":
                deque(decode(engine, coming(number), Generation(LIMIT, process_logits=look), max_prompt_tokens=600), 0)
            else:
                text(model, prompt(600, number), max_new_tokens=LIMIT, logits_processor=[look])
    learns = method.refresh != "none" and method.compensation == "ridge"
    corrections = 3 * 40 * (40 + 32) * 4 if method.compensation == "ridge" and not method.verified else 0
    least = CACHE + 3 * 3 * 40 * 32 * 4 + (3 * 40 * 40 * 4 if learns else 0) + corrections
    assert max(peaks) < least + min(CACHE, RECORDED) // 2
    assert max(peaks) - min(peaks) < 3000, "and nothing grows"


@pytest.mark.parametrize("call", [1, 2, 4, 10, 11])  # one row after the other: a step, a refresh, the second prompt
@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize("method", METHODS[1:], ids=lambda method: method.label)
def test_an_error_frees_everything_at_once(method: Method, most: int, call: int) -> None:
    model, caches, failed, before = tiny("llama"), [], False, held()

    def rows(engine: Engine) -> Iterator[Row]:
        for label in range(2):
            row = begun(engine, tokens(9, label), method, label)
            caches.extend([ref(row), ref(row.state), ref(row.state.cache)])
            yield row

    engine = Engine(model)
    with failing(model, call):
        try:
            deque(decode(engine, rows(engine), Generation(LIMIT), batch_size=most), 0)
        except torch.OutOfMemoryError:
            failed = True
    assert failed
    caches.append(ref(engine))
    del engine, rows
    assert not [one for one in caches if one() is not None]
    assert held() == before
