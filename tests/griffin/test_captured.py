"""What CUDA graphs need of decoding, proven without CUDA: one graph without breaks for all prompts, fixed addresses, a
host that does not wait, and memory that does not grow. A host that waits is shown to be seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from engines import BATCHED, begun, prefilled, uncompiled
from families import REFRESHED, SMALL, build, fresh, prompt, tiny, tokens
from running import text
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import fake_tensor

import griffin
from griffin import DENSE, RECIPE, STATISTICS, Engine, Generation, Method, begin, decode

DRAFTED = griffin.as_method("recipe", budget="uniform", verification="exact", draft_tokens=3)
METHODS = {"dense": DENSE, "griffin": Method(), "recipe": RECIPE, "verified": DRAFTED}
each_family = pytest.mark.parametrize("family", ["llama", "gpt2"])
# Of tensors without values; where CUDA is built in, no GPU is needed for them, and copies to the host are seen too.
DEVICE = "cuda" if torch.backends.cuda.is_built() else "cpu"
LIMIT = 21  # new tokens: two reads of the host, and two refreshes
WAITS = (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException)


class Graphs:
    """A compiler of what dynamo has traced and AOTAutograd has made functional; it runs the graph as it is."""

    def __init__(self) -> None:
        self.count = 0
        torch._dynamo.reset()

    def __call__(self, model: nn.Module) -> Callable[..., Any]:
        griffin.compiled_call(model)  # its settings; the compiler is this one, since generating code takes long
        backend = aot_autograd(fw_compiler=self._compile)
        return torch.compile(model.__call__, backend=backend, fullgraph=True, dynamic=False)

    def _compile(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


def texts(engine: Engine, method: Method, *lengths: int, limit: int = LIMIT) -> dict[int, Any]:
    """The new tokens of prompts of these lengths, together."""
    rows = [begun(engine, tokens(length, place), method, place) for place, length in enumerate(lengths)]
    ended = decode(engine, rows, Generation(limit), batch_size=len(rows), max_prompt_tokens=12)
    return {row.label: row.tokens for row in ended}


@pytest.mark.parametrize(
    ("method", "batches"),
    [*((method, [(5,), (12,), (9,)]) for method in METHODS.values()), (DENSE, [(5, 12), (9, 7), (8, 8)])],
    ids=[*METHODS, "batches"],
)
@each_family
def test_prompts_of_all_lengths_share_graphs(family: str, method: Method, batches: list[tuple[int, ...]]) -> None:
    found = []
    for compiler in (graphs := Graphs(), None):
        engine = Engine(tiny(family), compiler=compiler)
        for lengths in batches:
            found.append(texts(engine, method, *lengths))
            # The recipe's refreshes are not compiled. Verified: drafts, and checks.
            assert graphs.count == (2 if method.verified else 1)
    assert found[:3] == found[3:]


def test_every_sparsity_keeps_its_graph() -> None:
    small = build("llama", **SMALL | {"intermediate_size": 36, "num_hidden_layers": 1})
    engine = Engine(small, compiler=(graphs := Graphs()))
    for _ in range(2):
        for number in range(9):  # more of them than torch allows variants by default
            texts(engine, Method(sparsity=number / 9), 5, limit=3)
        assert graphs.count == 9


@pytest.mark.parametrize("method", ["griffin", "recipe", "exact"])
def test_prune_compiles(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(griffin.views, "compiled_call", graphs := Graphs())
    found = []
    for compiled in (True, False, "auto"):  # on a CPU that is nothing
        with griffin.prune(tiny("llama"), method, compiled=compiled):
            found += [text(tiny("llama"), prompt(9), max_new_tokens=LIMIT) for _ in range(2)]
            if compiled is True:
                with pytest.raises(ValueError, match=r"num_beams=2: \w+ follows one text"):
                    text(tiny("llama"), prompt(9), num_beams=2)
        assert graphs.count == (2 if method == "exact" else 1)
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@each_family
def test_weights_biases_and_caches_stay_where_they_are(family: str, method: Method, compiler: Any) -> None:
    engine, found = Engine(tiny(family), compiler=compiler), []
    for length in (5, 12, 9):
        texts(engine, method, length)
        layers = engine._cache.layers
        cached = [tensor for layer in layers for tensor in (layer.keys, layer.values, layer.cumulative_length)]
        weights = [weight for projection in engine.compact().shared for weight in projection.parameters()]
        found.append([tensor.data_ptr() for tensor in (*weights, *cached)])
    assert len(found[0]) > 6
    assert found[0] == found[1] == found[2]


def without_values(method: Method, monkeypatch: pytest.MonkeyPatch, compiler: Any, **how: Any) -> int:
    """Run two prompts on tensors that have no values, so that asking for one fails. The one place where the host reads
    tokens is given some.

    Returns:
        How often it has read them.
    """
    reads, prompts = [], [tokens(length, length) for length in (12, 9)]

    def on_host(steps: Sequence[Tensor]) -> list[list[int]]:
        reads.append(len(steps))
        return [[3] * len(step_B) for step_B in steps]

    monkeypatch.setattr(griffin.decoding, "on_host", on_host)
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device(DEVICE):
            model = fresh("llama")
        engine = Engine(model, compiler=compiler)
        for ids in prompts:
            (row,) = decode(engine, [begun(engine, ids, method)], Generation(LIMIT, **how))
            assert len(row.tokens) == LIMIT
    return len(reads)


@pytest.mark.parametrize("method", [DENSE, Method(), RECIPE], ids=["dense", "griffin", "recipe"])
def test_the_host_waits_only_to_read_tokens(method: Method, compiler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = without_values(method, monkeypatch, compiler)
    # Two prompts of 21 tokens, eight at a time; the recipe's refreshes after 8 and 16 tokens come with a read each.
    assert reads == (2 * LIMIT if compiler is None else 8 if method is RECIPE else 6)
    assert without_values(method, monkeypatch, compiler, draw=lambda row, p_V: p_V.multinomial(1)) == reads
    processed = without_values(method, monkeypatch, compiler, process_logits=lambda *given: given[-1])
    assert processed == 2 * LIMIT, "processors may ask for every token so far"


def test_verified_decoding_waits_once_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = []

    def of_round(numbers: Tensor, probabilities: list[Tensor]) -> tuple[list[int], list[float]]:
        rounds.append(len(probabilities))
        return [1, 3, 40, *[3] * (len(numbers) - 3)], [0.5] * len(probabilities)

    monkeypatch.setattr(griffin.verification, "on_host", of_round)
    monkeypatch.setattr(griffin.rows.Generation, "pick", lambda *_: torch.tensor([3]))  # the prompt's token is read too
    monkeypatch.setattr(griffin.draft_vocabulary.DraftView, "begin", lambda *_: None)  # and how many are likely
    without_values(griffin.as_method(DRAFTED, draft_vocabulary="full"), monkeypatch, uncompiled)
    assert rounds == 2 * [*9 * [3], 1]


CHOOSING = [
    *(*BATCHED, RECIPE, Method("wanda", "topk_sample", sparsity=(0.5, 0.0, 0.75)), Method("joint", **REFRESHED)),
    *(Method(name) for name in STATISTICS if name not in ("oracle", *(one.statistic for one in BATCHED))),
    Method(sparsity=0.9, compensation="ridge"),  # fewer kept neurons than rows to learn from
]


def test_neither_prompts_nor_choosing_nor_rows_of_several_methods_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(griffin.decoding, "on_host", lambda steps: [[3] * len(step_B) for step_B in steps])
    long, short, more = tokens(12), tokens(5, 1), tokens(4)
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        engine, record = Engine(fresh("llama")), griffin.wanted(CHOOSING)
        batch = griffin.prefill(engine, [long, short], record, prompt_lengths=[9, 5])
        (longer,) = griffin.prefill(engine, [long + more], record, prefix=prefilled(engine, long, *CHOOSING))
        assert type(longer.logits_TV).__name__ == "FakeTensor"
        rows = [row for method in CHOOSING for row in begin(engine, [longer], method, labels=[method])]
        rows += [row for method in CHOOSING[1:] for row in begin(engine, batch, method, labels=[0, 1])]
        ended = list(decode(engine, rows, Generation(LIMIT), batch_size=6))
    assert [len(row.tokens) for row in ended] == [LIMIT] * len(rows)


@pytest.mark.parametrize("wait", [lambda scores: float(scores.sum()), lambda scores: scores[scores > 0]])
def test_a_host_that_waits_would_tell(wait: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(*arguments: Any) -> Any:
        values = arguments[-1] if isinstance(arguments[-1], Tensor) else arguments[0].recorded
        wait(values)
        return values

    with pytest.raises(WAITS):
        without_values(Method(), monkeypatch, uncompiled, process_logits=waits)
    waiting = griffin.Statistic(waits, STATISTICS["griffin"].activations)
    with pytest.raises(WAITS):
        without_values(Method(waiting), monkeypatch, uncompiled)
