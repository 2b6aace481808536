"""Which forward calls are a prompt and which are generation follows from the KV cache; what a pruner tells of both."""

from __future__ import annotations

import pytest
import reference
import torch
from families import LAYERS, tiny
from reference import Span
from running import TOKENS, as_lists, difference, generate, new_tokens, pad, prompt, same, text
from torch import Tensor
from transformers import PreTrainedModel

import griffin
from griffin import RowStatistics, traffic

ROWS = [prompt(11, 0), prompt(4, 1), prompt(7, 2)]
pytestmark = pytest.mark.usefixtures("no_gradients")
each_mode = pytest.mark.parametrize("mode", griffin.MODES)


@each_mode
@pytest.mark.parametrize("options", [{}, {"compensation": "mean"}, {"compensation": "ridge"}], ids=str)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_second_prompt_is_as_the_first_in_a_new_context(family: str, options: dict[str, str], mode: str) -> None:
    model, first, second = tiny(family), prompt(11), prompt(7, 1)
    dense = model(second).logits
    with griffin.prune(model, mode=mode, **options) as pruner:
        expected, experts = generate(model, second), as_lists(pruner.experts)
    with griffin.prune(model, mode=mode, **options) as pruner:
        generate(model, first)
        assert torch.equal(model(second).logits, dense), "a prompt after generation is dense"
        assert torch.equal(model(second, use_cache=False).logits, dense), "and so is every call without a cache"
        assert torch.equal(model(second, torch.ones_like(second)).logits, dense), "arguments may be positional"
        found = generate(model, second)
    assert as_lists(pruner.experts) == experts
    assert same(found.logits, expected.logits)


@each_mode
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_several_tokens_on_a_filled_cache_are_generation(family: str, mode: str) -> None:
    model, ids = tiny(family), prompt(11)
    experts = reference.experts(model, family, "griffin", ids[:, :7], 0.5)
    expected, _ = reference.run(model, family, ids, Span(7, 11, experts))
    with griffin.prune(model, mode=mode):
        cache = model(ids[:, :7]).past_key_values
        first = model(ids[:, 7:10], past_key_values=cache).logits[0]
        second = model(ids[:, 10:], past_key_values=cache).logits[0]
    assert difference(torch.cat([first, second]), expected[7:]) < 1e-5


@each_mode
def test_generation_without_a_prompt_and_a_call_without_tokens_are_refused(mode: str) -> None:
    model = tiny("llama")
    cache = model(prompt(11)).past_key_values
    with griffin.prune(model, mode=mode):
        with pytest.raises(ValueError, match="run the prompt inside the context"):
            model(prompt(1, 1), past_key_values=cache)
        with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
            model(attention_mask=torch.ones(1, 3))


@each_mode
@pytest.mark.parametrize(
    "options", [{}, {"compensation": "ridge"}, {"selection": "sample"}, {"sparsity": [0, 0.9, 0.5]}]
)
def test_two_prompts_in_turn_each_continue_with_their_own_experts(options: dict[str, object], mode: str) -> None:
    model, prompts, following = tiny("llama"), [prompt(11, 0), prompt(7, 1)], [prompt(5, 2), prompt(5, 3)]

    def step(caches: list[object], which: int, at: int) -> Tensor:
        logits: Tensor = model(following[which][:, at : at + 1], past_key_values=caches[which]).logits
        return logits

    with griffin.prune(model, mode=mode, **options) as pruner:
        alone: list[list[Tensor]] = []
        experts = []
        for which, ids in enumerate(prompts):
            cache = model(ids).past_key_values
            alone.append([step([cache, cache], which, at) for at in range(5)])
            experts.append(as_lists(pruner.experts))
        caches = [model(ids).past_key_values for ids in prompts]
        found: list[list[Tensor]] = [[], []]
        for at, which in ((0, 0), (0, 1), (1, 1), (1, 0), (2, 0), (2, 1), (3, 1), (4, 1), (3, 0), (4, 0)):
            found[which].append(step(caches, which, at))
            assert as_lists(pruner.experts) == experts[which]
        text(model, prompt(5, 9))  # and after a generation of another text
    assert experts[0] != experts[1]
    for ours, theirs in zip(found, alone, strict=True):
        assert all(difference(*pair) < 1e-5 for pair in zip(ours, theirs, strict=True))


@each_mode
def test_forward_calls_go_on_after_generate_which_forgets_the_length_of_its_prompt(mode: str) -> None:
    model, ids, token = tiny("llama"), prompt(11), prompt(1, 1)
    with griffin.prune(model, mode=mode) as pruner:
        expected = model(token, past_key_values=model(prompt(3)).past_key_values).logits
        output = generate(model, ids)
        experts = as_lists(pruner.experts)
        assert torch.equal(model(token, past_key_values=model(prompt(3)).past_key_values).logits, expected)
        found = model(token, past_key_values=output.past_key_values).logits[0, -1]
    written = torch.cat([output.sequences[:, :-1], token], dim=1)
    span = Span(ids.shape[1], written.shape[1], experts)
    assert difference(found, reference.run(model, "llama", written, span)[0][-1]) < 1e-5


def converse(
    model: PreTrainedModel, family: str, first: Tensor, second: Tensor
) -> tuple[list[list[int]], list[int], Tensor]:
    """The reference of a second turn: its experts, its tokens and the first turn's answer.

    The last token of the answer was not forwarded yet, so it is read with the second turn.
    """
    start = first.shape[1]
    experts = reference.experts(model, family, "griffin", first, 0.5)
    answer, _ = reference.generate(model, family, first, experts, TOKENS)
    ids = torch.cat([first, torch.tensor([answer]), second], dim=1)
    turns = [Span(start, start + TOKENS - 1, experts)]
    _, z = reference.run(model, family, ids, *turns)
    # What the prompts wrote is scored, what was generated is not.
    prompts = [torch.cat([z_SD[:start], z_SD[start + TOKENS - 1 :]]) for z_SD in z]
    experts = [reference.best(one, 0.5) for one in reference.score_layers(model, family, "griffin", prompts)]
    length, found = ids.shape[1], []
    for _ in range(TOKENS):
        logits, _ = reference.run(model, family, ids, *turns, Span(length, ids.shape[1], experts))
        found.append(int(logits[-1].argmax()))
        ids = torch.cat([ids, torch.tensor([[found[-1]]])], dim=1)
    return experts, found, torch.tensor([answer])


@pytest.mark.parametrize("new_only", [False, True])
@pytest.mark.parametrize("chunk", [None, 2])
@each_mode
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_conversation_goes_on(family: str, mode: str, chunk: int | None, new_only: bool) -> None:
    model, first, second = tiny(family), prompt(9), prompt(4, 1)
    experts, expected, answer = converse(model, family, first, second)
    with griffin.prune(model, mode=mode) as pruner:
        turn = generate(model, first)
        assert torch.equal(turn.sequences, torch.cat([first, answer], dim=1))
        ids = torch.cat([turn.sequences, second], dim=1)
        mask = torch.ones_like(ids)  # covers what is cached too
        ids = torch.cat([answer[:, -1:], second], dim=1) if new_only else ids
        found = generate(model, ids, mask, past_key_values=turn.past_key_values, prefill_chunk_size=chunk)
    assert as_lists(pruner.experts) == experts
    assert new_tokens(found, ids) == [expected]


@each_mode
def test_a_cache_filled_before_pruning_or_by_another_prompt_begins_a_prompt(mode: str) -> None:
    model, ids = tiny("llama"), prompt(11)
    _, z = reference.run(model, "llama", ids)
    expected = reference.score_layers(model, "llama", "griffin", [z_SD[6:] for z_SD in z])
    cache = model(ids[:, :6]).past_key_values
    with griffin.prune(model, mode=mode) as pruner:
        generate(model, ids, past_key_values=cache)
        assert as_lists(pruner.experts) == [reference.best(scores_D, 0.5) for scores_D in expected]
    cache = model(ids[:, :6]).past_key_values
    with griffin.prune(model, mode=mode) as pruner, pruner.prefill():
        for other_length in (6, 7):
            model(prompt(other_length, 1))
            model(ids[:, 6:], past_key_values=cache)  # not the cache of the last prompt: a new one begins
            for layer in range(LAYERS):
                assert difference(pruner.scores[layer][0], expected[layer]) < 1e-5
            cache.crop(-5)


def test_there_is_nothing_before_a_prompt() -> None:
    with griffin.prune(tiny("llama")) as pruner:
        for what in ("scores", "experts", "chosen"):
            with pytest.raises(RuntimeError, match="no prompt has run yet"):
                getattr(pruner, what)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("selection", ["topk", "sample"])
@pytest.mark.parametrize("statistic", ["griffin", "max", "magnitude", "random"])
def test_there_is_one_row_per_sequence_or_one_for_all(statistic: str, selection: str, shared: bool) -> None:
    model, options = tiny("llama"), {"selection": selection, "mode": "masked", "shared_experts": shared}
    with griffin.prune(model, statistic=statistic, **options) as pruner:
        model(ROWS[0])
        early = as_lists(pruner.experts)
        generate(model, *pad(ROWS))
    assert as_lists(pruner.experts) == early or shared, "read before a token was generated, and after the context"
    assert [scores.shape for scores in pruner.scores] == [(1 if shared else 3, 80)] * LAYERS
    assert [experts.shape for experts in pruner.experts] == [(1 if shared else 3, 40)] * LAYERS
    for scores_BD, experts_BK in zip(pruner.scores, pruner.experts, strict=True):
        assert scores_BD.dtype == torch.float32
        assert experts_BK.dtype == torch.int64
        assert not scores_BD.requires_grad
        assert bool((experts_BK.diff(dim=1) > 0).all())
        if selection == "topk":
            assert set(experts_BK[-1].tolist()) == set(scores_BD[-1].topk(40).indices.tolist())


def test_stats_say_what_each_text_of_the_last_call_took() -> None:
    model, read, steps = tiny("llama"), traffic(tiny("llama"), [40] * LAYERS), 11
    exact = {"verification": "exact", "draft_tokens": 4, "draft_vocabulary": "full"}
    for options in ({"sparsity": 0.0}, {}, {"mode": "masked"}, {"mode": "masked", "refresh": "experts"}, exact):
        with griffin.prune(model, **options) as pruner:
            assert pruner.stats == pruner.drafts == []
            for batch in ((ROWS[0],), pad(ROWS)) if options and "sparsity" not in options else ((ROWS[0],),):
                text(model, *batch, max_new_tokens=steps + 1)
                count = len(batch[0])
                assert (len(pruner.stats), len(pruner.chosen)) == (count, count)
        drafts = pruner.drafts
        assert len(drafts) == (count if options is exact else 0)
        for place, row in enumerate(pruner.stats):
            assert (row.tokens, row.dense_bytes) == (steps + 1, steps * read.dense)
            assert row.effective_density == row.bytes_read / row.dense_bytes
            assert row.seconds > 0
            dense = steps if "sparsity" in options else 1 if "refresh" in options else 0
            expected, pruned, acceptance = dense, steps - dense, None
            if drafts:
                assert drafts[place].emitted == steps
                expected, pruned = drafts[place].checks, drafts[place].drafted
                acceptance = drafts[place].accepted / drafts[place].drafted
            assert (row.dense_steps, row.acceptance) == (expected, acceptance)
            assert row.bytes_read == expected * read.dense + pruned * read.pruned
    assert RowStatistics(1, 0, 0, 0, 0.0).effective_density == 1.0, "nothing was decoded"
