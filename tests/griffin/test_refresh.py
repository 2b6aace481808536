"""Refresh: what was generated is read again by the dense model, and experts or compensation follow it."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from families import LAYERS, VARIED, tiny
from prompts import pad, prompt
from running import as_lists, difference, generate, new_tokens, step_logits
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import griffin
from griffin import Engine, Generation, Method, Row, drift, refresh, ridge
from griffin.drift import Drift

TOKENS = 12
SCHEDULED = ["experts", "compensation"]
KINDS = [*SCHEDULED, "drift"]


@pytest.fixture(autouse=True)
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refreshes after 2, 4, 8, .. tokens, and a look at what has drifted after every second one."""
    monkeypatch.setattr(refresh, "_FIRST", 2)
    monkeypatch.setattr(drift, "WINDOW", 2)


def method(kind: str, **options: Any) -> Method:
    return Method(**({"compensation": "ridge", "refresh": kind} | options))


def begun(engine: Engine, ids: Tensor, chosen: Method) -> Row:
    """The row of a prompt [1, S] under a method."""
    (row,) = griffin.begin(engine, griffin.prefill(engine, ids.tolist(), griffin.wanted([chosen])), chosen)
    return row


def forced(engine: Engine, row: Row, following: Tensor) -> Tensor:
    """[C, V]: the row's logits after each of the tokens [1, C] that follow its prompt."""
    ((_, logits_CV),) = griffin.score(engine, [(row, following[0].tolist())], 1)
    return logits_CV


# -- when -------------------------------------------------------------------------------------------------------------


def test_refreshes_are_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = [refresh.next_refresh(generated) for generated in (0, 7, 8, 9, 16, 31, 32, 127)]
    assert found == [8, 8, 16, 16, 32, 32, 64, 128]


def test_a_given_text_is_read_in_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert refresh.call_ends(8) == [0, 8]
    assert refresh.call_ends(9) == [0, 8, 9]
    assert refresh.call_ends(17) == [0, 8, 9, 16, 17]
    assert refresh.call_ends(40) == [0, 8, 9, 16, 17, 32, 33, 40]


# -- what it computes -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", SCHEDULED)
@pytest.mark.parametrize("family", VARIED)
def test_a_refresh_is_dense_and_the_modes_agree(family: str, kind: str) -> None:
    """Its own logits are dense, and so is all that comes before it."""
    model, ids, following = tiny(family), prompt(11), prompt(TOKENS, 1)
    dense = model(torch.cat([ids, following], dim=1)).logits[0, ids.shape[1] :]
    found = {}
    for mode in griffin.MODES:
        engine = Engine(model, mode=mode)
        found[mode] = forced(engine, begun(engine, ids, method(kind)), following)
        for step in range(TOKENS):
            assert (difference(found[mode][step], dense[step]) < 2e-5) == (step in (2, 4, 8)), step
        engine.unload()
    assert difference(found["compact"], found["masked"]) < 2e-5


@pytest.mark.parametrize("mode", griffin.MODES)
@pytest.mark.parametrize("statistic", ["griffin", "max", "recency", "magnitude", "random"])
def test_new_experts_are_those_of_the_longer_prompt(statistic: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With generated tokens that count as others do, refreshing is generating from prompt and text."""
    monkeypatch.setattr("griffin.decoding.WEIGHT", 1.0)
    engine, ids, following = Engine(tiny("llama"), mode=mode), prompt(11), prompt(6, 1)
    row = begun(engine, ids, method("experts", statistic=statistic))
    found = forced(engine, row, following)[5]
    longer = begun(engine, torch.cat([ids, following[:, :5]], dim=1), method("none", statistic=statistic))
    expected = forced(engine, longer, following[:, 5:])[0]
    for refreshed, chosen in zip(row.experts.neurons, longer.experts.neurons, strict=True):
        assert torch.equal(refreshed, chosen)
    assert difference(found, expected) < 2e-5


def test_a_generated_token_counts_as_several_and_scores_can_be_read() -> None:
    model, ids = tiny("llama"), prompt(5)
    with griffin.prune(model, refresh="experts") as pruner:
        sequences = generate(model, ids, max_new_tokens=4).sequences
    _, z = reference.run(model, "llama", sequences[:, :8])  # the last token has not run
    for layer in range(LAYERS):
        counts_S1 = torch.tensor([[1.0]] * 5 + [[refresh.WEIGHT]] * 3).double()
        squares_SD = (z[layer] / z[layer].norm(dim=-1, keepdim=True)).square()
        expected_D = (counts_S1 * squares_SD).sum(dim=0).sqrt()
        assert difference(pruner.scores[layer][0], expected_D) < 1e-6
        assert pruner.experts[layer][0].tolist() == reference.best(expected_D, 0.5)


@pytest.mark.parametrize("sparsity", [0.5, 0.9])  # fewer rows than kept neurons, and more
def test_what_is_learned_is_the_ridge_solution_of_all_rows(sparsity: float) -> None:
    model, ids, following = tiny("llama"), prompt(21), prompt(6, 1)
    engine = Engine(model)
    row = begun(engine, ids, method("compensation", sparsity=sparsity))
    forced(engine, row, following)
    _, z = reference.run(model, "llama", torch.cat([ids, following[:, :5]], dim=1))
    for layer in range(LAYERS):
        kept = row.experts.neurons[layer]
        found_KH = sum(correction.change() for correction in row.experts.corrections[layer])
        weights_HD = reference.output_matrix(model, "llama", layer)
        unit_SD = z[layer] / z[layer].norm(dim=-1, keepdim=True)
        prompt_rows = torch.stack([unit_SD[i : min(i + 2, 21)].sum(dim=0) for i in range(0, 21, 2)])
        rows_TD = torch.cat([prompt_rows, refresh.WEIGHT**0.5 * unit_SD[21:]])
        dropped = torch.ones(rows_TD.shape[1], dtype=torch.bool).index_fill_(0, kept, False)
        penalty = ridge.RIDGE * prompt_rows[:, kept].square().sum() / len(kept)
        gram_KK = rows_TD[:, kept].T @ rows_TD[:, kept] + penalty * torch.eye(len(kept)).double()
        wrote_TH = rows_TD[:, dropped] @ weights_HD[:, dropped].T
        expected_KH = torch.linalg.solve(gram_KK, rows_TD[:, kept].T @ wrote_TH)
        assert difference(found_KH, expected_KH) < 1e-5


def test_the_rows_kept_bound_what_joins_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge, "ROWS", 4)
    engine = Engine(tiny("llama"))
    row = begun(engine, prompt(11), method("experts"))
    forced(engine, row, prompt(TOKENS, 1))
    totals = [total for layers in row.state.recorded.totals.values() for total in layers]
    assert {total.shape[1] for total in totals if total.dim() == 3} == {4}


def test_rows_that_share_experts_learn_once_when_the_first_of_them_has_ended() -> None:
    engine = Engine(tiny("llama"))
    chosen = method("compensation")
    states = griffin.prefill(
        engine, torch.cat([prompt(7, seed) for seed in range(3)]).tolist(), griffin.wanted([chosen])
    )
    rows = griffin.begin(engine, states, chosen, labels=range(3))
    rule = Generation(4, griffin.greedy, lambda row: row.label == 0)
    assert [len(row.tokens) for row in griffin.decode(engine, rows, 3, 3, 7, rule)] == [1, 4, 4]
    # The one refresh so far has added one correction to the prompt's.
    assert {len(corrections) for row in rows[1:] for corrections in row.experts.corrections} == {2}


def test_experts_are_put_to_work_again_without_what_was_learned_since() -> None:
    engine, ids, following = Engine(tiny("llama"), mode="compact"), prompt(11), prompt(TOKENS, 1)
    state = begun(engine, ids, method("compensation")).state
    experts = griffin.choose(engine, [state], method("compensation"))
    found = []
    for _ in range(2):
        row = Row([state], 0, method("compensation"), experts)
        found.append(forced(engine, row, following))
    assert torch.equal(*found)


def test_a_layer_that_keeps_all_is_dense_whatever_method_came_before() -> None:
    engine, ids, following = Engine(tiny("llama"), mode="compact"), prompt(11), prompt(TOKENS, 1)
    chosen = method("compensation", sparsity=(0.5, 0.0, 0.5))
    alone = forced(engine, begun(engine, ids, chosen), following)
    forced(engine, begun(engine, ids, method("none")), following)
    assert torch.equal(forced(engine, begun(engine, ids, chosen), following), alone)


# -- within generate --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", griffin.MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_generate_is_the_engines_decoding_and_scoring(family: str, kind: str, mode: str) -> None:
    model, ids = tiny(family), prompt(11)
    with griffin.prune(model, compensation="ridge", refresh=kind, mode=mode) as pruner:
        output = generate(model, ids, max_new_tokens=TOKENS)
    engine = Engine(model, mode=mode)
    row = begun(engine, ids, method(kind))
    list(griffin.decode(engine, [row], 1, 1, ids.shape[1], Generation(TOKENS, griffin.greedy, lambda row: False)))
    assert new_tokens(output, ids) == [row.tokens]
    assert as_lists(pruner.experts) == [neurons_K.tolist() for neurons_K in row.experts.neurons]
    scored = forced(engine, begun(engine, ids, method(kind)), output.sequences[:, ids.shape[1] : -1])
    assert difference(step_logits(output)[1:], scored) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "opt", "bloom", "gemma2"])  # one for each way to tell positions
def test_a_left_padded_batch_equals_its_rows(family: str, kind: str) -> None:
    model, prompts = tiny(family), [prompt(length, length) for length in (11, 4, 7)]
    ids_BS, mask_BS = pad(prompts, "left")
    with griffin.prune(model, refresh=kind, mode="masked", compensation="ridge") as pruner:
        batch = generate(model, ids_BS, mask_BS)
        experts = pruner.experts
        for row, ids in enumerate(prompts):
            alone = generate(model, ids)
            assert new_tokens(batch, ids_BS)[row] == new_tokens(alone, ids)[0]
            assert difference(step_logits(batch, row), step_logits(alone)) < 5e-5
            assert as_lists(experts, row) == as_lists(pruner.experts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_shares_its_experts(kind: str) -> None:
    model, found = tiny("llama"), []
    ids_BS, mask_BS = pad([prompt(11, 0), prompt(4, 1)], "left")
    for mode in griffin.MODES:
        options = {"refresh": kind, "mode": mode, "compensation": "ridge", "shared_experts": True}
        with griffin.prune(model, **options) as pruner:
            found.append(generate(model, ids_BS, mask_BS, max_new_tokens=TOKENS))
        assert [experts.shape for experts in pruner.experts] == [(1, 40)] * LAYERS
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert all(difference(*steps) < 5e-5 for steps in zip(found[0].logits, found[1].logits, strict=True))


class Ended:
    """A stopping criterion: all rows end when they have so many tokens."""

    def __init__(self, prompt_length: int, most: int) -> None:
        self.prompt_length, self.most = prompt_length, most

    def __call__(self, ids_BS: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(ids_BS),), ids_BS.shape[1] >= self.prompt_length + self.most)


ROWS = [prompt(7, 0), prompt(4, 1)]
RULES: dict[str, dict[str, Any]] = {
    "a penalty": {"repetition_penalty": 3.0},
    "no repetition": {"no_repeat_ngram_size": 1},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 5},
    "the end token of one row": {"eos_token_id": -1},
    "an end token that comes too soon": {"eos_token_id": -1, "min_new_tokens": 5},
    "a stopping criterion": {"stopping_criteria": [Ended(7, 3)]},
    "one token": {"max_new_tokens": 1},
    "a total length": {"max_new_tokens": None, "max_length": 11},
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_until_the_first_refresh_generate_obeys_as_without_one(
    rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    model, (ids_BS, mask_BS) = tiny("llama"), pad(ROWS, "left")
    found = []
    for kind in ("none", "experts"):
        with griffin.prune(model, mode="masked", refresh=kind):
            if rule.get("eos_token_id"):  # what the second row says third
                rule = rule | {"eos_token_id": new_tokens(generate(model, ids_BS, mask_BS), ids_BS)[1][2]}
            torch.manual_seed(0)
            found.append(generate(model, ids_BS, mask_BS, **rule, output_scores=True))
    plain, refreshed = found
    assert torch.equal(refreshed.sequences, plain.sequences)
    assert len(refreshed.logits) == len(refreshed.scores) == len(plain.logits)
    for step in range(len(plain.logits)):
        running = plain.sequences[:, 7 + step] != 0  # ended rows are padded, and not run
        torch.testing.assert_close(refreshed.logits[step][running], plain.logits[step][running], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(refreshed.scores[step][running], plain.scores[step][running], rtol=1e-4, atol=1e-4)


def test_a_row_that_ends_leaves_the_others_theirs() -> None:
    model, (ids_BS, mask_BS) = tiny("llama"), pad(ROWS, "left")
    with griffin.prune(model, mode="masked", refresh="experts"):
        whole = new_tokens(generate(model, ids_BS, mask_BS, max_new_tokens=TOKENS), ids_BS)
        end = whole[1][3]
        assert end not in whole[0] + whole[1][:3]
        found = new_tokens(generate(model, ids_BS, mask_BS, max_new_tokens=TOKENS, eos_token_id=end), ids_BS)
    assert found == [whole[0], whole[1][:4] + [0] * (TOKENS - 4)]


class Listener(BaseStreamer):
    """What a streamer is told."""

    def __init__(self) -> None:
        self.heard: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.heard.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_streamer_hears_the_prompt_and_every_token(kind: str) -> None:
    model, ids, listener = tiny("llama"), prompt(11), Listener()
    with griffin.prune(model, compensation="ridge", refresh=kind):
        sequences = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, streamer=listener)
    assert isinstance(sequences, Tensor)
    assert listener.heard == [ids[0].tolist(), *([token] for token in sequences[0, 11:].tolist())]
    assert listener.ended == 1


@pytest.mark.parametrize("kind", KINDS)
def test_sparsity_0_is_bit_identical_to_dense(kind: str) -> None:
    model, ids = tiny("gemma3_text"), prompt(11)
    dense = generate(model, ids, max_new_tokens=TOKENS)
    with griffin.prune(model, 0.0, refresh=kind, compensation="ridge"):
        assert torch.equal(step_logits(generate(model, ids, max_new_tokens=TOKENS)), step_logits(dense))


# -- what is refused --------------------------------------------------------------------------------------------------


def assert_untouched(model: PreTrainedModel, ids: Tensor, dense: Tensor) -> None:
    assert torch.equal(model(ids).logits, dense)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


@torch.no_grad()
@pytest.mark.parametrize("mode", griffin.MODES)
def test_forward_calls_by_hand_are_refused(mode: str) -> None:
    model, ids = tiny("llama"), prompt(11)
    dense = model(ids).logits
    with griffin.prune(model, refresh="experts", mode=mode):
        cache = model(ids).past_key_values
        with pytest.raises(ValueError, match=r"refresh='experts' works within model\.generate"):
            model(prompt(1), past_key_values=cache)
        generate(model, ids)
    assert_untouched(model, ids, dense)


@torch.no_grad()
@pytest.mark.parametrize("mode", griffin.MODES)
def test_a_generation_that_fails_leaves_the_model_dense(mode: str) -> None:
    model, ids, kept = tiny("llama"), prompt(11), []

    def fail(ids_BS: Tensor, scores_BV: Tensor) -> Tensor:
        kept.append(None)
        if len(kept) == 4:
            raise KeyError
        return scores_BV

    dense = model(ids).logits
    with griffin.prune(model, refresh="experts", mode=mode):
        expected = generate(model, ids).sequences
        with pytest.raises(KeyError):
            generate(model, ids, logits_processor=[fail])
        assert torch.equal(model(ids).logits, dense)
        assert torch.equal(generate(model, ids).sequences, expected)
    assert_untouched(model, ids, dense)


@pytest.mark.parametrize("option", ["num_beams", "num_return_sequences"])
def test_one_text_a_prompt(option: str) -> None:
    model = tiny("llama")
    with griffin.prune(model, refresh="experts", mode="masked"), pytest.raises(ValueError, match=f"{option}=2"):
        model.generate(prompt(5), max_new_tokens=2, do_sample=option != "num_beams", **{option: 2})


def test_prompts_that_cannot_be_read_again_are_refused() -> None:
    model, ids = tiny("llama"), prompt(5)
    cache = model(ids[:, :3]).past_key_values
    with griffin.prune(model, refresh="experts"):
        with pytest.raises(ValueError, match="refresh needs input_ids"):
            model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=2)
        with pytest.raises(ValueError, match="KV cache of its own"):
            model.generate(ids, past_key_values=cache, max_new_tokens=2)
        with pytest.raises(ValueError, match="batch has 2 prompts"):
            model.generate(ids.repeat(2, 1), max_new_tokens=2)


@pytest.mark.parametrize("compensation", ["none", "mean"])
def test_only_what_can_learn_is_told_to(compensation: str) -> None:
    with pytest.raises(ValueError, match=f"refresh='compensation' with compensation='{compensation}'.*ridge"):
        griffin.prune(tiny("llama"), refresh="compensation", compensation=compensation)


# -- drift ------------------------------------------------------------------------------------------------------------


def profile(*directions: float) -> list[Tensor]:
    """Activations [T, K] of one layer that point into the given directions of a plane, in degrees."""
    angles_T = torch.tensor(directions).deg2rad()
    return [torch.stack([angles_T.cos(), angles_T.sin()], dim=1)]


def test_text_that_goes_on_as_it_was_chosen_by_does_not_drift() -> None:
    row = Drift(profile(30.0)[0], begun=True)
    for angle in (35.0, 34.0, 36.0, 33.0, 37.0, 35.0):
        row.see(profile(angle))
        assert not row.due
    assert row.likeness == pytest.approx(float(torch.tensor(5.0).deg2rad().cos()), abs=1e-3)


def test_text_that_turns_drifts_at_the_end_of_a_window() -> None:
    row = Drift(profile(30.0)[0], begun=True)
    row.see(profile(30.0, 30.0))
    row.see(profile(80.0))
    assert not row.due
    row.see(profile(80.0))
    assert row.due


def test_experts_of_a_prompt_are_chosen_anew_after_the_first_tokens() -> None:
    row = Drift(profile(30.0)[0], begun=False)
    row.see(profile(30.0))
    assert not row.due
    row.see(profile(30.0))
    assert row.due


@torch.no_grad()
@pytest.mark.parametrize("fall", [-1.0, 1.0])
def test_a_drifted_row_is_dense_for_one_step(fall: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every look finds drift, each third token is dense: two are seen. Where none does, only the third is."""
    monkeypatch.setattr(drift, "FALL", fall)
    model, ids, following = tiny("llama"), prompt(11), prompt(TOKENS, 1)
    dense = model(torch.cat([ids, following], dim=1)).logits[0, ids.shape[1] :]
    for mode in griffin.MODES:
        engine = Engine(model, mode=mode)
        row = begun(engine, ids, method("drift"))
        found = forced(engine, row, following)
        steps = [step for step in range(TOKENS) if difference(found[step], dense[step]) < 2e-5]
        assert steps == ([2, 5, 8, 11] if fall < 0 else [2])
        assert row.refreshed == len(steps)
        engine.unload()


def test_drift_is_no_schedule_for_checks() -> None:
    with pytest.raises(ValueError, match="refresh='drift' with verification='exact'"):
        Method(refresh="drift", verification="exact")
