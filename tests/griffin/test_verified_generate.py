"""`model.generate` inside `griffin.prune(..., verification=...)` obeys as it does without pruning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import VOCABULARY, fresh, tiny
from prompts import pad, prompt
from running import as_lists
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    TextStreamer,
    pipeline,
)

import griffin

TOKENS = 12
LEARNING: dict[str, dict[str, Any]] = {
    "nothing": {},
    "compensation": {"compensation": "ridge", "refresh": "compensation"},
    "experts": {"refresh": "experts"},
}


def generate(model: PreTrainedModel, ids_BS: Tensor, **options: Any) -> Tensor:
    defaults = {"attention_mask": torch.ones_like(ids_BS), "max_new_tokens": TOKENS, "do_sample": False}
    sequences_BS: Tensor = model.generate(ids_BS, **(defaults | options))
    return sequences_BS


class Counting(StoppingCriteria):
    """Ends a text at a length, and counts how often it was asked."""

    def __init__(self, length: int) -> None:
        self.length, self.asked = length, 0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.asked += 1
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def only_even(ids_BS: Tensor, scores_BV: Tensor) -> Tensor:
    """A logits processor of one's own."""
    scores_BV[:, 1::2] = -torch.inf
    return scores_BV


RULES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a penalty": {"repetition_penalty": 3.0},
    "no repetition": {"no_repeat_ngram_size": 1},
    "a processor": {"logits_processor": [only_even]},
    "one token": {"max_new_tokens": 1},
    "a total length": {"max_new_tokens": None, "max_length": 16},
    "a config": {
        "max_new_tokens": None,
        "generation_config": GenerationConfig(max_new_tokens=5, repetition_penalty=2.0),
    },
    "an end token that comes too soon": {"eos_token_id": -1, "min_new_tokens": 5},
    "an end token": {"eos_token_id": -1},
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("learning", LEARNING.values(), ids=LEARNING)
def test_the_text_is_the_dense_models_under_every_rule(rule: dict[str, Any], learning: dict[str, Any]) -> None:
    model, ids = tiny("llama"), prompt(11)
    if rule.get("eos_token_id"):
        rule = rule | {"eos_token_id": int(generate(model, ids)[0, 13])}
    dense = generate(model, ids, **rule)
    for draft_vocabulary in griffin.DRAFT_VOCABULARIES:
        with griffin.prune(model, verification="exact", draft_vocabulary=draft_vocabulary, **learning) as pruner:
            assert torch.equal(generate(model, ids, **rule), dense)
        (drafting,) = pruner.drafting
        assert drafting.emitted == dense.shape[1] - 12
        assert drafting.checks <= drafting.emitted


def test_a_text_ends_within_a_round_and_is_asked_about_once_a_token() -> None:
    model, ids = tiny("llama"), prompt(11)
    for most in range(1, 9):
        rules = [Counting(11 + most), Counting(11 + most)]
        dense = generate(model, ids, stopping_criteria=[rules[0]])
        with griffin.prune(model, 0.05, verification="exact", draft_tokens=4):
            assert torch.equal(generate(model, ids, stopping_criteria=[rules[1]]), dense)
        assert rules[1].asked == rules[0].asked == most


def test_the_seed_decides_what_is_sampled_and_dense_words_only_are() -> None:
    model, ids, found = tiny("llama"), prompt(11), []
    rule = {"do_sample": True, "top_k": 2, "temperature": 0.8}
    with griffin.prune(model, verification="exact", draft_tokens=3):
        for seed in (0, 0, 1, 2):
            torch.manual_seed(seed)
            found.append(generate(model, ids, **rule))
    assert torch.equal(found[0], found[1])
    assert len({tuple(text[0].tolist()) for text in found}) > 1
    for text in found:
        logits_TV = model(text).logits[0, 10:-1]
        best_T2 = logits_TV.topk(2).indices
        assert bool((best_T2 == text[0, 11:].unsqueeze(1)).any(dim=1).all())


def test_a_threshold_keeps_more_and_may_leave_the_dense_text() -> None:
    model, ids, kept = fresh("llama"), prompt(11), []
    for threshold in (0.0001, 0.9):
        with griffin.prune(
            model, 0.8, verification="threshold", verification_threshold=threshold, draft_tokens=4
        ) as pruner:
            generate(model, ids)
        kept.append(pruner.drafting[0].accepted)
    assert kept[0] > kept[1]


def test_several_prompts_run_one_after_the_other_each_with_its_experts() -> None:
    model, rows = tiny("llama"), [prompt(11, 0), prompt(4, 1), prompt(7, 2)]
    ids_BS, mask_BS = pad(rows, "left")
    end = int(generate(model, rows[1])[0, 4 + 5])
    dense = generate(model, ids_BS, attention_mask=mask_BS, eos_token_id=end, pad_token_id=0)
    with griffin.prune(model, verification="exact") as pruner:
        with pytest.warns(UserWarning, match="the 3 prompts run one after the other"):
            found = generate(model, ids_BS, attention_mask=mask_BS, eos_token_id=end, pad_token_id=0)
        assert torch.equal(found, dense)
        assert len(pruner.drafting) == 3
        together = [as_lists(pruner.experts, row) for row in range(3)]
        alone = []
        for ids in rows:
            generate(model, ids)
            alone.append(as_lists(pruner.experts))
    assert together == alone


# -- what people use --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    # "abcdef" is a word that stop strings are taken apart with.
    vocabulary = {"abcdef" if number == 2 else f"w{number}": number for number in range(VOCABULARY)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="abcdef"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="abcdef",
        eos_token="w1",
        pad_token="w0",
        chat_template="{% for message in messages %}w5 {{ message['content'] }} {% endfor %}w6",
    )


TEXT = "w10 w11 w12 w13 w14"


def test_a_streamer_prints_the_text_as_it_grows(
    tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    model, ids = tiny("llama"), tokenizer(TEXT, return_tensors="pt").input_ids
    with griffin.prune(model, 0.1, verification="exact", draft_tokens=4):
        found = generate(model, ids, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out.split() == tokenizer.decode(found[0]).split()


@pytest.mark.parametrize("prompt", [TEXT, [{"role": "user", "content": TEXT}]], ids=["text", "chat"])
def test_the_pipeline_of_transformers(tokenizer: PreTrainedTokenizerFast, prompt: Any) -> None:
    model = fresh("llama")
    talk = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": TOKENS, "max_length": None, "do_sample": False}
    dense = talk(prompt, **options)
    with griffin.prune(model, verification="exact") as pruner:
        assert talk(prompt, **options) == dense
        assert pruner.drafting[0].checks


def test_stop_strings(tokenizer: PreTrainedTokenizerFast) -> None:
    model, ids = tiny("llama"), tokenizer(TEXT, return_tensors="pt").input_ids
    length = ids.shape[1]
    word = tokenizer.decode(generate(model, ids)[0, length + 4])
    dense = generate(model, ids, stop_strings=[word], tokenizer=tokenizer)
    assert dense.shape[1] < length + TOKENS
    with griffin.prune(model, verification="exact"):
        assert torch.equal(generate(model, ids, stop_strings=[word], tokenizer=tokenizer), dense)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "masked"}, "mode='masked' with verification='exact'.*expected compact"),
        ({"shared_experts": True}, "shared_experts=True with verification='exact'.*expected False"),
        ({"offload_dense": True}, "offload_dense=True with verification='exact'.*expected False"),
        ({"sparsity": 0}, "verification='exact' with sparsity=0"),
        ({"draft_tokens": 0}, "draft_tokens=0: expected auto, or 1 to 16"),
        ({"verification_threshold": 1.5}, "verification_threshold=1.5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_do_not_go_with_it(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        griffin.prune(tiny("llama"), **({"verification": "exact"} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams=2: verification follows one text a prompt"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2: verification follows one text"),
        ({"return_dict_in_generate": True, "output_scores": True}, "output_scores=True"),
        ({"return_dict_in_generate": True, "output_logits": True}, "output_logits=True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_ways_to_generate_that_do_not_go_with_it(options: dict[str, Any], message: str) -> None:
    model, ids = tiny("llama"), prompt(5)
    with griffin.prune(model, verification="exact"), pytest.raises(ValueError, match=message):
        generate(model, ids, **options)


def test_a_streamer_hears_one_text(tokenizer: PreTrainedTokenizerFast) -> None:
    model, ids_BS = tiny("llama"), prompt(5).repeat(2, 1)

    class Silent(TextStreamer):
        def put(self, value: Tensor) -> None:
            """Nothing."""

    refusal = pytest.raises(ValueError, match="a streamer and 2 prompts: expected one prompt")
    with griffin.prune(model, verification="exact"), refusal, pytest.warns(UserWarning, match="2 prompts"):
        generate(model, ids_BS, streamer=Silent(tokenizer))


@torch.no_grad()
def test_forward_calls_by_hand_are_refused_and_the_model_is_as_it_was() -> None:
    model, ids = tiny("llama"), prompt(11)
    dense = model(ids).logits
    with griffin.prune(model, verification="exact"):
        cache = model(ids).past_key_values
        with pytest.raises(ValueError, match=r"verification='exact' works within model\.generate"):
            model(prompt(1), past_key_values=cache)
        generate(model, ids)
    assert torch.equal(model(ids).logits, dense)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
