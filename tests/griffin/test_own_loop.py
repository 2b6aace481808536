"""`model.generate` on our own decoding loop, which refresh and verification need, obeys as transformers' own does."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from families import IDS, REFRESHED, ROWS, VERIFIED, VOCABULARY, fresh, pad, prompt, tiny
from running import as_lists, generate, same, text
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, StaticCache, pipeline

import griffin

ROWS = ROWS[:3]
LOOPS: dict[str, dict[str, Any]] = {
    "refreshed": REFRESHED | {"mode": "masked"},
    "verified": VERIFIED | {"draft_tokens": 4, "sparsity": 0.05},
    "verified, full vocabulary": VERIFIED | {"draft_vocabulary": "full"},
    "verified, learning": VERIFIED | REFRESHED,
}
each_loop = pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)


def until(length: int) -> Mock:
    """What ends texts at a length."""
    ended = lambda ids_BS, scores, **_: torch.full((len(ids_BS),), ids_BS.shape[1] >= length)  # noqa: E731
    return Mock(side_effect=ended)


def by_row(row: int, ids_S: Tensor) -> list[int]:
    """The tokens that each row of a batch may go on with; the second one ends first."""
    return [3] if row == 1 and len(ids_S) >= 14 else [*range(10 + 20 * row, 30 + 20 * row)]


RULES: list[dict[str, Any]] = [
    *({}, {"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 1}),
    {"logits_processor": [lambda ids, logits_BV: logits_BV.index_fill_(1, torch.arange(1, VOCABULARY, 2), -torch.inf)]},
    *({"max_new_tokens": 1}, {"max_new_tokens": None, "max_length": 16}, {"cache_implementation": "static"}),
    {"max_new_tokens": None, "generation_config": GenerationConfig(max_new_tokens=5, top_k=3)},
    *({"prefix_allowed_tokens_fn": by_row, "eos_token_id": 3}, {"stopping_criteria": [until(14)]}),
    *({"eos_token_id": -1}, {"eos_token_id": -1, "min_new_tokens": 5}),  # the end token of one row, or too soon
]


@pytest.mark.parametrize("rule", RULES, ids=" ".join)
@each_loop
def test_texts_are_those_of_transformers(loop: Any, rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the dense model where they are verified; of the pruned one where a refresh never comes."""
    monkeypatch.setattr(griffin.refresh, "_FIRST", 8 if "verification" in loop else 99)
    model, batch, rule = tiny("llama"), pad(ROWS), {"max_new_tokens": 12} | rule
    with griffin.prune(model, 0.0 if "verification" in loop else 0.5, mode="masked", compensation="ridge"):
        if rule.get("eos_token_id") == -1:  # what the second row says third
            rule |= {"eos_token_id": int(text(model, *batch)[1, 13])}
        expected = text(model, *batch, **rule)
    with griffin.prune(model, **loop) as pruner:
        assert torch.equal(text(model, *batch, **rule), expected)
        together = [as_lists(pruner.experts, row) for row in range(3)]
        drafts = list(pruner.drafts)
        for row, ids in enumerate(ROWS):
            text(model, ids)
            assert as_lists(pruner.experts) == together[row]
    for row, one in enumerate(drafts):
        length = int((expected[row, 11:] != 0).sum())
        assert (one.emitted, one.checks <= one.emitted) == (length - 1, True)
        assert one.emitted - one.accepted in (one.checks, one.checks - 1), "a text may end before a check's own token"


@each_loop
def test_a_criterion_is_asked_and_a_streamer_hears_once_a_token(loop: dict[str, Any]) -> None:
    model, listener = tiny("llama"), Mock()
    for most in (1, 4, 7):
        rule = until(11 + most)
        with griffin.prune(model, **loop):
            assert text(model, IDS, stopping_criteria=[rule], max_new_tokens=12).shape[1] == 11 + most
        assert rule.call_count == most
    with griffin.prune(model, **loop):
        sequences = text(model, IDS, max_new_tokens=12, streamer=listener)
        with pytest.raises(ValueError, match="a streamer and 3 prompts: expected one prompt"):
            text(model, *pad(ROWS), streamer=listener)
    heard = [call.args[0].flatten().tolist() for call in listener.put.call_args_list]
    assert heard[:13] == [IDS[0].tolist(), *([token] for token in sequences[0, 11:].tolist())]
    listener.end.assert_called_once()


def test_the_seed_decides_what_is_sampled_and_dense_words_only_are() -> None:
    model, found = tiny("llama"), []
    with griffin.prune(model, **VERIFIED, draft_tokens=3):
        for seed in (0, 0, 1, 2):
            torch.manual_seed(seed)
            found.append(text(model, IDS, do_sample=True, top_k=2, temperature=0.8, max_new_tokens=12))
    assert torch.equal(found[0], found[1])
    assert len({tuple(one[0].tolist()) for one in found}) > 1
    for one in found:
        best_T2 = model(one).logits[0, 10:-1].topk(2).indices
        assert bool((best_T2 == one[0, 11:].unsqueeze(1)).any(dim=1).all())


def test_the_pipeline_and_stop_strings_of_transformers() -> None:
    # "abcdef" is a word that stop strings are taken apart with.
    vocabulary = {"abcdef" if number == 2 else f"w{number}": number for number in range(VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="abcdef"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="abcdef", eos_token="w1", pad_token="w0")
    model, said, options = fresh("llama"), "w50 w51 w52 w53 w54", {"max_new_tokens": 12, "do_sample": False}
    talk = pipeline("text-generation", model=model, tokenizer=tokenizer)
    ids = tokenizer(said, return_tensors="pt").input_ids
    stop = {"stop_strings": [tokenizer.decode(text(model, ids, **options)[0, 9])], "tokenizer": tokenizer}
    expected = talk(said, **options), text(model, ids, **options, **stop).tolist()
    assert len(expected[1][0]) < 5 + 12
    with griffin.prune(model, **VERIFIED) as pruner:
        assert talk(said, **options) == expected[0]
        assert pruner.drafts[0].checks
        assert text(model, ids, **options, **stop).tolist() == expected[1]


DICT = {"return_dict_in_generate": True}
REFUSED: list[dict[str, Any]] = [
    *({name: 2, "do_sample": name != "num_beams"} for name in ("num_beams", "num_return_sequences")),
    *({name: True, **DICT} for name in ("output_attentions", "output_hidden_states")),
    *({name: torch.ones_like(IDS)} for name in ("token_type_ids", "position_ids", "labels")),
    {"inputs_embeds": torch.zeros(1, 11, 32)},
]


@pytest.mark.parametrize("options", REFUSED, ids=lambda options: next(iter(options)))
@each_loop
def test_what_our_loop_cannot_honour_is_refused_by_name(loop: dict[str, Any], options: dict[str, Any]) -> None:
    with griffin.prune(tiny("llama"), **loop), pytest.raises(ValueError, match=next(iter(options))):
        text(tiny("llama"), IDS, **options)
    for name in ("output_scores", "output_logits") if "verification" in loop else ():
        with griffin.prune(tiny("llama"), **loop), pytest.raises(ValueError, match=f"{name}=True"):
            text(tiny("llama"), IDS, **DICT, **{name: True})


@torch.no_grad()
@each_loop
def test_forward_calls_by_hand_are_prompts_only(loop: dict[str, Any]) -> None:
    model = tiny("llama")
    dense = model(IDS).logits
    reason = "verification" if "verification" in loop else "refresh"
    with griffin.prune(model, **loop):
        output = model(IDS)
        assert same([output.logits], [dense])
        with pytest.raises(ValueError, match=rf"{reason}='\w+' works within model\.generate"):
            model(prompt(1), past_key_values=output.past_key_values)


def turns(model: Any, batch: list[Tensor], new_only: bool, decoding: Any = None, **cache: Any) -> list[Tensor]:
    """What two turns say, and a third one."""
    (ids_BS, mask_BS), found, options = pad(batch), [], {"max_new_tokens": 9, "output_logits": False}
    options |= {"custom_generate": decoding} if decoding else {}
    for turn in range(3):
        output = generate(model, ids_BS, mask_BS, **options, **cache)
        found.append(output.sequences[:, ids_BS.shape[1] :])
        cache = {"past_key_values": output.past_key_values}
        more_BS = torch.cat([prompt(4, 20 + turn + row) for row in range(len(batch))])
        ids_BS = torch.cat([output.sequences[:, -1:] if new_only else output.sequences, more_BS], dim=1)
        columns = 4 + mask_BS.shape[1] + found[-1].shape[1]
        mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(batch), columns - mask_BS.shape[1])], dim=1)
    return found


@pytest.mark.parametrize("new_only", [False, True])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("loop", ["verified, full vocabulary", "verified, learning"])
def test_a_verified_conversation_is_dense(family: str, static: bool, rows: int, new_only: bool, loop: str) -> None:
    """A left-padded one too; the last token of a turn has not run, and is read with the next turn."""
    model = tiny(family)

    def talk(decoding: Any = None) -> list[Tensor]:
        cache = {"past_key_values": StaticCache(model.config, max_cache_len=64)} if static else {}
        return turns(model, ROWS[:rows], new_only, decoding, **cache)

    expected = talk()
    with griffin.prune(model, **LOOPS[loop]) as pruner:
        assert same(talk(), expected)
        assert len(pruner.stats) == rows
    assert same(talk(griffin.decode_with("griffin", **LOOPS[loop])), expected)
