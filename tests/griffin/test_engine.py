"""The engine: what lasts from prompt to prompt, and which executor runs which rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from engines import begun, generated, plain_logits, prefilled, tokens
from families import LAYERS, ONE_PER_LAYOUT, build, tiny
from running import difference
from torch import nn

import griffin
from griffin import Engine, Experts, Method, choose, refuse_uncroppable
from griffin.kv_cache import KVCache


def experts(engine: Engine, seed: int = 0) -> Experts:
    found = choose(engine, [prefilled(engine, tokens(9, seed), Method())], Method())
    assert found is not None
    return found


def at_work(engine: Engine) -> str:
    """Which executor the next call will run on."""
    compact = sum(block.output.weight.numel() != 32 * block.width for block in engine.blocks)
    masked = sum(bool(block.output._forward_pre_hooks) for block in engine.blocks)
    return {(0, 0): "dense", (LAYERS, 0): "compact", (0, LAYERS): "masked"}[compact, masked]


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode='fast': expected one of auto, compact, masked"):
        Engine(tiny("llama"), mode="fast")


def test_rows_that_share_experts_run_compact_and_others_masked() -> None:
    model = tiny("llama")
    engine, masked = Engine(model), Engine(model, mode="masked")
    one, other = experts(engine), experts(engine, 1)
    cases: list[tuple[Sequence[Experts | None], str]] = [
        *(([one], "compact"), ([one, one], "compact"), ([one, other], "masked"), ([None, one], "masked")),
        *(
            ([None], "dense"),
            ([other], "compact"),
            ([None, None], "dense"),
            ([one, None], "masked"),
            ([one], "compact"),
        ),
    ]
    for rows, expected in cases:
        engine.load(rows)
        assert at_work(engine) == expected
    engine.use_dense()
    for rows, expected in cases:
        masked.load(rows)
        assert at_work(masked) == expected.replace("compact", "masked")
    masked.use_dense()
    assert at_work(engine) == "dense"


@pytest.mark.parametrize("family", [*ONE_PER_LAYOUT, "gemma3_text"])
def test_a_dense_call_is_the_plain_model_to_the_bit(family: str) -> None:
    """Whatever ran before."""
    model = tiny(family)
    engine, calls = Engine(model), [tokens(6), tokens(1, 1), tokens(1, 2)]
    cache = KVCache(1, 12)
    found = []
    for call in calls:
        engine.load([experts(engine)])
        found.append(engine.dense(torch.tensor([call]), cache)[0])
    expected = plain_logits(model, *calls)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert at_work(engine) == "dense"
    last = engine.dense(torch.tensor([tokens(6)]), KVCache(1, 12), logits_to_keep=2)[0]
    assert torch.equal(last, plain_logits(model, tokens(6), keep=2)[0])


def test_a_model_that_only_runs_dense_may_have_any_blocks() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 97}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = build("mixtral", **sizes, **heads, num_local_experts=4, num_experts_per_tok=2)
    with pytest.raises(griffin.UnsupportedModelError, match="mixture of experts"):
        Engine(model)
    engine = Engine(model, pruning=False)
    ((text, logits),) = generated(engine, [begun(engine, tokens(5), Method(sparsity=0.0))], 1, 4).values()
    expected = torch.cat(plain_logits(model, tokens(5), *([token] for token in text[:-1]), keep=1))
    assert difference(logits, expected) < 1e-5


def test_the_decoding_cache_is_the_same_where_it_is_large_enough() -> None:
    engine = Engine(tiny("llama"))
    first = engine.decoding_cache(2, 20)
    assert engine.decoding_cache(1, 9) is first
    assert engine.decoding_cache(2, 20) is first
    assert engine.decoding_cache(3, 20) is not first
    assert engine.decoding_cache(1, 21).columns == 21
    compiled = Engine(tiny("llama"), compiled=tiny("llama"))
    first = compiled.decoding_cache(2, 20)
    assert first.whole
    assert compiled.decoding_cache(2, 9) is first
    assert compiled.decoding_cache(1, 9) is not first, "a compiled graph is for so many rows"


def test_nothing_is_kept_after_unloading() -> None:
    engine = Engine(tiny("llama"))
    generated(engine, [begun(engine, tokens(9), Method())], 1, 3)
    assert engine._caches.get(False) is not None
    assert engine._compact._compact
    engine.unload()
    assert engine._caches.get(False) is None
    assert not engine._compact._compact
    assert at_work(engine) == "dense"
    assert len(generated(engine, [begun(engine, tokens(9), Method())], 1, 3)) == 1


def test_models_without_a_kv_cache_that_can_be_cropped_are_refused() -> None:
    refuse_uncroppable(tiny("gemma3_text"))
    with pytest.raises(griffin.UnsupportedModelError, match="Linear is not a transformers language model"):
        refuse_uncroppable(nn.Linear(1, 1))


# -- compiled decoding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "methods"),
    [("llama", [Method(), Method("wanda", compensation="mean")]), ("gemma3_text", [Method()])],
    ids=["llama", "sliding-windows"],
)
def test_compiled_decoding_gives_the_same_texts(family: str, methods: list[Method]) -> None:
    """One graph without breaks for all prompts, steps and experts of one method's buffers."""
    model, graphs = tiny(family), []

    def compiler(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward  # generating code takes long, and tests of the pipeline do

    torch._dynamo.reset()
    plain = Engine(model)
    compiled = Engine(model, compiled=torch.compile(model.__call__, backend=compiler, fullgraph=True, dynamic=False))
    for ids in (tokens(12, 1), tokens(5, 2)):
        for method in methods:
            found, expected = (
                next(iter(generated(engine, [begun(engine, ids, method)], 1, 10, longest=12).values()))
                for engine in (compiled, plain)
            )
            assert found[0] == expected[0]
            assert difference(found[1], expected[1]) < 1e-5
    assert len(graphs) == len(methods)
    torch._dynamo.reset()
