"""Refresh: what was generated is read again by the dense model, and experts or compensation follow it."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, ONE_PER_LAYOUT, fresh, tiny
from prompts import pad, prompt
from running import as_lists, difference, generate, new_tokens, step_logits
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

import griffin
from griffin import latest_rows, refresh
from griffin.feedforward import find_feedforward_blocks, weight_out_in
from griffin.ridge import RIDGE

TOKENS = 12
KINDS = ["experts", "compensation"]
OPTIONS = {"compensation": "ridge"}


@pytest.fixture(autouse=True)
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readings after 2, 4, 8, .. tokens."""
    monkeypatch.setattr(refresh, "_FIRST", 2)
    monkeypatch.setattr(refresh, "_FACTOR", 2)


def test_readings_are_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    readings = [refresh.next_reading(generated) for generated in (0, 7, 8, 9, 16, 31, 32, 127)]
    assert readings == [8, 8, 16, 16, 32, 32, 64, 128]


def test_a_given_text_is_read_in_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert refresh.call_ends(8) == [0, 8]
    assert refresh.call_ends(9) == [0, 8, 9]
    assert refresh.call_ends(17) == [0, 8, 9, 16, 17]
    assert refresh.call_ends(40) == [0, 8, 9, 16, 17, 32, 33, 40]


@torch.no_grad()
def teacher_forced(model: PreTrainedModel, ids: Tensor, following: Tensor) -> Tensor:
    """[C, V]: token by token, as `generate` would read them."""
    output = model(ids, use_cache=True)
    logits = []
    for token in following[0]:
        output = model(token.view(1, 1), past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits[0, -1])
    return torch.stack(logits)


@torch.no_grad()
@pytest.mark.parametrize("mode", griffin.MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_reading_is_the_dense_models(family: str, kind: str, mode: str) -> None:
    """Its own logits are dense, and so is all that comes before it."""
    model, ids, following = tiny(family), prompt(11), prompt(TOKENS, 1)
    dense = model(torch.cat([ids, following], dim=1)).logits[0, ids.shape[1] :]
    with griffin.prune(model, refresh=kind, mode=mode, **OPTIONS):
        found = teacher_forced(model, ids, following)
    readings = [2, 4, 8]
    for step in range(TOKENS):
        assert (difference(found[step], dense[step]) < 2e-5) == (step in readings), step


@torch.no_grad()
@pytest.mark.parametrize("mode", griffin.MODES)
@pytest.mark.parametrize("statistic", ["griffin", "wanda", "max", "recency", "magnitude", "random"])
@pytest.mark.parametrize("family", ONE_PER_LAYOUT)
def test_new_experts_are_those_of_the_longer_prompt(
    family: str, statistic: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With generated tokens that count as others do, refreshing is generating from prompt and text."""
    monkeypatch.setattr("griffin.pruner.WEIGHT", 1.0)
    model, ids, following = tiny(family), prompt(11), prompt(6, 1)
    options = {"statistic": statistic, "mode": mode, **OPTIONS}
    with griffin.prune(model, refresh="experts", **options) as pruner:
        found = teacher_forced(model, ids, following)[5]
        refreshed = as_lists(pruner.experts)
    with griffin.prune(model, **options) as pruner:
        expected = teacher_forced(model, torch.cat([ids, following[:, :5]], dim=1), following[:, 5:])[0]
        assert as_lists(pruner.experts) == refreshed
    assert difference(found, expected) < 2e-5


@torch.no_grad()
def test_a_generated_token_counts_as_several() -> None:
    model, ids, following = fresh("llama"), prompt(5), prompt(4, 1)  # its hooks stay
    z = []
    for block in (blocks := find_feedforward_blocks(model)):
        block.output.register_forward_pre_hook(lambda _, args: z.append(args[0][0].double()))
    model(torch.cat([ids, following[:, :3]], dim=1))
    with griffin.prune(model, refresh="experts") as pruner:
        teacher_forced(model, ids, following)
    for scores_1D, z_SD in zip(pruner.scores, z, strict=False):
        counts_S = torch.tensor([1.0] * 5 + [refresh.WEIGHT] * 3).double()
        squares_SD = (z_SD / z_SD.norm(dim=-1, keepdim=True)).square()
        assert difference(scores_1D[0], (counts_S.unsqueeze(1) * squares_SD).sum(dim=0).sqrt()) < 1e-6
    assert len(pruner.scores) == len(blocks)


@torch.no_grad()
@pytest.mark.parametrize("sparsity", [0.5, 0.9])  # fewer rows than kept neurons, and more
def test_what_is_learned_is_the_ridge_solution_of_all_rows(sparsity: float) -> None:
    model, ids, following = tiny("llama"), prompt(21), prompt(6, 1)
    z: list[Tensor] = []
    handles = [
        block.output.register_forward_pre_hook(lambda _, args: z.append(args[0][0].double()))
        for block in find_feedforward_blocks(model)
    ]
    model(torch.cat([ids, following[:, :5]], dim=1))
    for handle in handles:
        handle.remove()

    with griffin.prune(model, sparsity, refresh="compensation", **OPTIONS) as pruner:
        teacher_forced(model, ids, following)
        for layer, block in enumerate(pruner.blocks):
            kept = pruner.experts[layer][0]
            changed_HK = weight_out_in(block.output).detach().double()
            with torch.no_grad():
                pruner._work.pause()
                weights_HD = weight_out_in(block.output).detach().double()
                pruner._work.resume([None] * len(pruner.blocks))
            unit_SD = z[layer] / z[layer].norm(dim=-1, keepdim=True)
            prompt_rows = torch.stack([unit_SD[i : min(i + 2, 21)].sum(dim=0) for i in range(0, 21, 2)])
            rows_TD = torch.cat([prompt_rows, refresh.WEIGHT**0.5 * unit_SD[21:]])
            dropped = torch.ones(rows_TD.shape[1], dtype=torch.bool).index_fill_(0, kept, False)
            penalty = RIDGE * prompt_rows[:, kept].square().sum() / len(kept)
            gram_KK = rows_TD[:, kept].T @ rows_TD[:, kept] + penalty * torch.eye(len(kept)).double()
            wrote_TH = rows_TD[:, dropped] @ weights_HD[:, dropped].T
            expected_KH = weights_HD[:, kept].T + torch.linalg.solve(gram_KK, rows_TD[:, kept].T @ wrote_TH)
            assert difference(changed_HK, expected_KH.T) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ONE_PER_LAYOUT)
def test_compact_equals_masked(family: str, kind: str) -> None:
    model, ids = tiny(family), prompt(11)
    steps = []
    for mode in griffin.MODES:
        with griffin.prune(model, refresh=kind, mode=mode, **OPTIONS):
            steps.append(step_logits(generate(model, ids, max_new_tokens=TOKENS)))
    assert difference(*steps) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ONE_PER_LAYOUT)
def test_a_batch_equals_its_rows(family: str, kind: str) -> None:
    model = tiny(family)
    prompts = [prompt(length, length) for length in (11, 4, 7)]
    options = {"refresh": kind, "mode": "masked", **OPTIONS}
    with griffin.prune(model, **options):
        batch = generate(model, *pad(prompts, "left"), max_new_tokens=TOKENS)
        for row, ids in enumerate(prompts):
            alone = generate(model, ids, max_new_tokens=TOKENS)
            assert new_tokens(batch, pad(prompts, "left")[0])[row] == new_tokens(alone, ids)[0]
            assert difference(step_logits(batch, row), step_logits(alone)) < 5e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_does_what_forward_calls_do(family: str, kind: str) -> None:
    """Whatever cache `generate` makes: with layers whose window slides it must be set back all the same."""
    model, ids = tiny(family), prompt(11)
    with griffin.prune(model, refresh=kind, **OPTIONS):
        output = generate(model, ids, max_new_tokens=TOKENS)
        found = step_logits(output)[1:]
        expected = teacher_forced(model, ids, output.sequences[:, 11:-1])
    assert difference(found, expected) < 2e-5


@torch.no_grad()
@pytest.mark.parametrize("mode", griffin.MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ONE_PER_LAYOUT)
def test_a_shared_prompt_refreshes_as_the_pruner_does(family: str, kind: str, mode: str) -> None:
    model, ids, following = tiny(family), prompt(11), prompt(TOKENS, 1)
    with griffin.prune(model, refresh=kind, **OPTIONS):
        expected = teacher_forced(model, ids, following)
    shared = griffin.SharedPrompt(model, ["griffin"], ["ridge"])
    shared.run(ids, torch.tensor([11]))

    def choose(prompts: griffin.SharedPrompt) -> tuple[list[Tensor], list]:
        experts = prompts.experts("griffin", "topk", 0.5)
        return experts, prompts.corrections("ridge", experts, fits=kind == "compensation")

    for _ in range(2):  # the second time from the same prompt, undisturbed
        experts, corrections = choose(shared)
        reader = (
            shared.renewal(mode, choose) if kind == "experts" else shared.refit(mode, "ridge", experts, corrections)
        )
        if mode == "masked":
            found = shared.continued(following, torch.tensor([TOKENS]), experts, corrections, reader)[0]
        else:
            cache = shared.fork(TOKENS)
            with shared.pruned(experts, corrections, mode, reader):
                found = torch.stack(
                    [model(token.view(1, 1), past_key_values=cache).logits[0, -1] for token in following[0]]
                )
        assert difference(found, expected) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_sparsity_0_is_bit_identical_to_dense(kind: str) -> None:
    model, ids = tiny("gemma3_text"), prompt(11)
    dense = generate(model, ids, max_new_tokens=TOKENS)
    with griffin.prune(model, 0.0, refresh=kind, **OPTIONS):
        assert torch.equal(step_logits(generate(model, ids, max_new_tokens=TOKENS)), step_logits(dense))


@pytest.mark.parametrize("kind", KINDS)
def test_a_generation_that_fails_leaves_the_model_dense(kind: str) -> None:
    model, ids = tiny("llama"), prompt(11)
    dense = model(ids).logits
    cache = StaticCache(model.config, max_cache_len=64)
    with griffin.prune(model, refresh=kind, **OPTIONS):
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="StaticCache"):
            model(prompt(1), past_key_values=cache)
    assert torch.equal(model(ids).logits, dense)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


@pytest.mark.parametrize("option", ["num_beams", "num_return_sequences"])
def test_one_text_a_prompt(option: str) -> None:
    model = tiny("llama")
    with griffin.prune(model, refresh="experts", mode="masked"), pytest.raises(ValueError, match=f"{option}=2"):
        model.generate(prompt(5), max_new_tokens=2, do_sample=option != "num_beams", **{option: 2})


@pytest.mark.parametrize("compensation", ["none", "mean"])
def test_only_what_can_learn_is_told_to(compensation: str) -> None:
    with pytest.raises(ValueError, match=f"refresh='compensation' with compensation='{compensation}'.*ridge"):
        griffin.prune(tiny("llama"), refresh="compensation", compensation=compensation)


def test_an_unknown_refresh_is_named() -> None:
    with pytest.raises(ValueError, match="refresh='often': expected one of none, experts, compensation"):
        griffin.prune(tiny("llama"), refresh="often")


def test_the_rows_kept_bound_what_joins_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latest_rows, "ROWS", 4)
    model, ids = tiny("llama"), prompt(11)
    with griffin.prune(model, refresh="experts", **OPTIONS) as pruner:
        generate(model, ids, max_new_tokens=TOKENS)
        totals = pruner._gatherer.totals().values()
    assert {total.shape[1] for layers in totals for total in layers if total is not None and total.dim() == 3} == {4}


@torch.no_grad()
def test_a_layer_that_keeps_all_is_dense_whatever_method_came_before() -> None:
    model, ids = tiny("llama"), prompt(11)

    def refitted(shared: griffin.SharedPrompt) -> torch.Tensor:
        experts = shared.experts("griffin", "topk", [0.5, 0.0, 0.5])
        corrections = shared.corrections("ridge", experts, fits=True)
        reader, cache = shared.refit("compact", "ridge", experts, corrections), shared.fork(12)
        with shared.pruned(experts, corrections, "compact", reader):
            steps = [model(ids[:, :1], past_key_values=cache, use_cache=True).logits for _ in range(12)]
        return torch.cat(steps)

    alone, after = (griffin.SharedPrompt(model, ["griffin"], ["ridge"]) for _ in range(2))
    for shared in (alone, after):
        shared.run_each([ids[0]])
    halved = after.experts("griffin", "topk", 0.5)
    with after.pruned(halved, None, "compact"):
        model(ids[:, :1], past_key_values=after.fork(1), use_cache=True)
    assert torch.equal(refitted(after), refitted(alone))
