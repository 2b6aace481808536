"""Prompt after prompt, nothing is left behind and nothing is allocated anew."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable

import pytest
import torch
from families import ONE_PER_LAYOUT, tiny
from griffin.compaction import COPY_AFTER, CompactProjection
from griffin.in_pieces import FEW
from prompts import prompt
from transformers import PreTrainedModel

import griffin

PROMPTS = 200


def held() -> tuple[int, int]:
    """How many tensors there are, and how many bytes their storages have."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    sparse = [tensor for tensor in tensors if tensor.layout == torch.sparse_csr]
    strided = [tensor for tensor in tensors if tensor.layout == torch.strided]
    strided += [part for one in sparse for part in (one.crow_indices(), one.col_indices(), one.values())]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in strided}
    return len(tensors), sum(storages.values())


def with_the_pruner(
    model: PreTrainedModel, mode: str, compensation: str, offload: bool, watch: Callable[[int], None]
) -> None:
    with griffin.prune(model, 0.5, mode=mode, compensation=compensation, offload_dense=offload):
        for number in range(PROMPTS):
            ids = prompt(6 + number % 5)
            cache = model(ids, use_cache=True).past_key_values
            model(ids[:, :1], past_key_values=cache, use_cache=True)
            del cache
            watch(number)


def with_a_shared_prompt(
    model: PreTrainedModel, mode: str, compensation: str, offload: bool, watch: Callable[[int], None]
) -> None:
    shared = griffin.SharedPrompt(model, ["griffin"], [compensation])
    with griffin.Offload(model) if offload else contextlib.nullcontext():
        for number in range(PROMPTS):
            ids = prompt(6 + number % 5)
            shared.run_each([ids[0]])
            for sparsity in (0.25, 0.5):
                experts = shared.experts("griffin", "topk", sparsity)
                with shared.pruned(experts, shared.corrections(compensation, experts), mode):
                    model(ids[:, :1], past_key_values=shared.fork(2), use_cache=True)
            del experts
            watch(number)


def with_refresh(
    model: PreTrainedModel, mode: str, compensation: str, offload: bool, watch: Callable[[int], None]
) -> None:
    options = {"compensation": compensation, "refresh": "experts" if compensation == "none" else "compensation"}
    with griffin.prune(model, 0.5, mode=mode, offload_dense=offload, **options):
        for number in range(PROMPTS):
            cache = model(prompt(6 + number % 5), use_cache=True).past_key_values
            for length in (8, 1, 1):  # the second is read with what came before it
                model(prompt(length), past_key_values=cache, use_cache=True)
            del cache
            watch(number)


@pytest.mark.parametrize("run", [with_the_pruner, with_a_shared_prompt, with_refresh])
@pytest.mark.parametrize("compensation", ["none", "ridge"])
@pytest.mark.parametrize(("mode", "offload"), [("compact", False), ("masked", False), ("compact", True)])
@torch.no_grad()
def test_memory_does_not_grow(mode: str, offload: bool, compensation: str, run: Callable[..., None]) -> None:
    found = {}

    def watch(number: int) -> None:
        if number in (9, PROMPTS - 1):  # two prompts of one length
            found[number] = held()

    run(tiny("llama"), mode, compensation, offload, watch)
    assert found[PROMPTS - 1] == found[9]


def places(model: PreTrainedModel) -> dict[str, int]:
    return {name: weight.data_ptr() for name, weight in model.named_parameters()}


@pytest.mark.parametrize(("compiled", "tokens"), [(True, 1), (False, FEW + 1)], ids=["compiled", "many-tokens"])
@pytest.mark.parametrize("family", ONE_PER_LAYOUT)
@torch.no_grad()
def test_every_prompt_uses_the_same_buffers(family: str, compiled: bool, tokens: int) -> None:
    model = tiny(family)
    dense, found = places(model), []
    with griffin.prune(model, 0.5, compiled=compiled):
        for length in (5, 9, 7):
            cache = model(prompt(length), use_cache=True).past_key_values
            model(prompt(tokens), past_key_values=cache, use_cache=True)
            found.append(places(model))
    assert found[0] == found[1] == found[2]
    assert sum(found[0][name] != place for name, place in dense.items()) >= 2 * model.config.num_hidden_layers


@pytest.mark.parametrize("family", ONE_PER_LAYOUT)
@torch.no_grad()
def test_the_first_tokens_copy_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, gathered = tiny(family), []
    gather = CompactProjection.gather

    def watched(projection: CompactProjection) -> None:
        gathered.append(projection)
        gather(projection)

    monkeypatch.setattr(CompactProjection, "gather", watched)
    dense = places(model)
    with griffin.prune(model, 0.5):
        for length in (9, 5):
            cache = model(prompt(length), use_cache=True).past_key_values
            for _ in range(COPY_AFTER):
                model(prompt(1), past_key_values=cache, use_cache=True)
            assert not gathered
        for _ in range(3):
            model(prompt(1), past_key_values=cache, use_cache=True)
        assert len(gathered) == len(set(gathered)) >= 2 * model.config.num_hidden_layers
        assert places(model) == dense
