"""The host never waits for the device: neither in prompts, nor in choosing, nor in the steps of decoding.

Fake tensors have shapes and no values, so whatever asks for a value raises: `item`, `tolist`, `nonzero`, a tensor as a
condition. `decode` itself reads the tokens that were picked, once a step; so the steps are made by hand here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engines import begun, tokens
from families import build
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from griffin import STATISTICS, Engine, Method, Row, Statistic, begin, choose, prefill, wanted
from griffin.decoding import Batch

WAITS = (DataDependentOutputException, DynamicOutputShapeException)

STEPS = 10  # with one refresh
LONG, SHORT, MORE = tokens(12), tokens(5, 1), tokens(4, 2)
CHOOSING = [
    *(Method(name) for name, one in STATISTICS.items() if not one.self_generated and not one.oracle),
    Method("random", "sample"),
    Method("wanda", "topk_sample", sparsity=(0.5, 0.0, 0.75)),
    Method(compensation="mean", budget="late"),
    Method(sparsity=0.9, compensation="ridge"),  # fewer kept neurons than rows to learn from
    Method(compensation="ridge"),
]
REFRESHED = [
    Method("joint", compensation="mean", refresh="experts"),
    Method(compensation="ridge", refresh="compensation"),
]


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def model() -> Any:
    """Made anew, so that its parameters are fake too."""
    return build(
        "llama", hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, vocab_size=97
    )


def steps(batch: Batch, ids_B1: Tensor, count: int) -> None:
    """Greedy decoding, whose tokens never leave the device."""
    for _ in range(count):
        for row in batch.rows:
            row.tokens.append(0)  # the host would have read it; only its number counts
        logits_BTV = batch.step(ids_B1)
        ids_B1 = logits_BTV[:, -1].argmax(dim=-1, keepdim=True)


def decoded(engine: Engine, rows: list[Row]) -> None:
    batch = Batch(engine, len(rows), 12, STEPS)
    for row in rows:
        batch.add(row)
    steps(batch, torch.stack([row.state.logits_TV[-1].argmax(dim=-1, keepdim=True) for row in rows]), STEPS)
    engine.use_dense()


def test_neither_prompts_nor_choosing_wait(fake: FakeTensorMode) -> None:
    engine, record = Engine(model()), wanted(CHOOSING)
    batch = prefill(engine, [LONG, SHORT], record, prompt_lengths=[9, 5])
    (longer,) = prefill(engine, [LONG + MORE], record, prefix=prefill(engine, [LONG], record)[0])
    assert type(longer.logits_TV).__name__ == "FakeTensor"
    for method in CHOOSING:
        for states in ([longer], batch):
            assert choose(engine, states, method) is not None


@pytest.mark.parametrize("method", [Method(sparsity=0.0), *REFRESHED], ids=lambda method: method.family)
def test_neither_dense_nor_compact_steps_wait(fake: FakeTensorMode, method: Method) -> None:
    engine = Engine(model())
    decoded(engine, [begun(engine, LONG, method)])
    assert bool(engine._compact._compact) != method.dense


def test_masked_steps_do_not_wait(fake: FakeTensorMode) -> None:
    """Of several prompts and methods, of which one leaves and others come."""
    engine, methods = Engine(model()), [Method(sparsity=0.0), Method(), *REFRESHED]
    long, short = prefill(engine, [LONG, SHORT], wanted(methods))
    rows = [row for method in methods for row in begin(engine, [long], method)]
    batch = Batch(engine, 6, 12, 2 * STEPS, waiting=True)
    for row in rows:
        batch.add(row)
    steps(batch, torch.zeros(4, 1, dtype=torch.int64), STEPS)
    batch.remove(rows[1])
    for row in begin(engine, [short, long], methods[1], labels=[0, 1]):
        batch.add(row)
    steps(batch, torch.zeros(5, 1, dtype=torch.int64), 2)
    assert engine._masked._dropped
    engine.use_dense()


def test_steps_on_whole_caches_do_not_wait(fake: FakeTensorMode) -> None:
    engine = Engine(model())
    engine.compiled = engine.model
    batch = Batch(engine, 1, 12, 3)
    batch.add(begun(engine, LONG, Method()))
    steps(batch, torch.zeros(1, 1, dtype=torch.int64), 3)
    assert engine._caches.get(False) is not None
    assert engine._caches.get(False).whole
    engine.use_dense()


# -- a wait that is put in on purpose is found ------------------------------------------------------------------------


def waiting(score: Callable[..., Tensor], wait: Callable[[Tensor], Any]) -> Callable[..., Tensor]:
    def waits(*args: Any) -> Tensor:
        scores = score(*args)
        wait(scores)
        return scores

    return waits


@pytest.mark.parametrize(
    "wait",
    [
        lambda scores: scores.max().item(),
        lambda scores: scores.tolist(),
        lambda scores: scores.nonzero(),
        lambda scores: bool(scores.any()),
        lambda scores: scores[scores > 0],
    ],
    ids=["item", "tolist", "nonzero", "condition", "mask"],
)
def test_a_statistic_that_waits_is_found(
    fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch, wait: Callable[[Tensor], Any]
) -> None:
    plain = STATISTICS["griffin"]
    monkeypatch.setitem(STATISTICS, "griffin", Statistic(waiting(plain.score, wait), plain.activations))
    with pytest.raises(WAITS):
        begun(Engine(model()), LONG, Method())


def test_a_step_that_waits_is_found(fake: FakeTensorMode) -> None:
    engine = Engine(model())
    row = begun(engine, LONG, Method())
    engine.blocks[1].output.register_forward_hook(lambda _, args, output: output.sum().item() and None)
    with pytest.raises(WAITS):
        decoded(engine, [row])
