"""What CUDA graphs need of decoding, proven without CUDA: one graph without breaks for all prompts, fixed addresses, a
host that does not wait, and memory that does not grow. Each proof is shown to fail where its property is broken."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from engines import TOLERANCE, begun, never, prefilled, tokens
from families import ONE_PER_LAYOUT, fresh, tiny
from running import difference
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from transformers import PreTrainedModel

from griffin import Engine, Generation, Method, Row, begin, compiled_call, decode, decoding, executors, greedy

DENSE, GRIFFIN = Method(sparsity=0.0), Method()
RECIPE = Method("joint", compensation="ridge", budget="late", refresh="compensation")
VERIFIED = Method(
    *("joint", "topk", 0.5),
    compensation="ridge",
    refresh="compensation",
    verification="exact",
    draft_tokens=3,
    draft_vocabulary="full",
)
METHODS = {"dense": DENSE, "griffin": GRIFFIN, "recipe": RECIPE, "verified": VERIFIED}
LENGTHS = (5, 12, 9)
# Of tensors without values; where CUDA is built in, no GPU is needed for them, and copies to the host are seen too.
DEVICE = "cuda" if torch.backends.cuda.is_built() else "cpu"
LIMIT = 21  # new tokens: two reads of the host, and two refreshes


class Graphs:
    """A compiler of what dynamo has traced and AOTAutograd has made functional; it runs the graph as it is."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        torch._dynamo.reset()
        compiled_call(model)  # its settings; the compiler is this one, since generating code takes long
        self.call = torch.compile(
            model.__call__, backend=aot_autograd(fw_compiler=self._compile), fullgraph=True, dynamic=False
        )

    def _compile(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    with torch._dynamo.config.patch(recompile_limit=8, skip_nnmodule_hook_guards=True):
        yield
    torch._dynamo.reset()


def continued(engine: Engine, rows: Sequence[Row], longest: int = max(LENGTHS), **how: Any) -> list[list[int]]:
    """The new tokens of each row."""
    generation = Generation(LIMIT, how.get("pick", greedy), never)
    ended = {row.label: row.tokens for row in decode(engine, rows, len(rows), len(rows), longest, generation)}
    return [ended[row.label] for row in rows]


def texts(engine: Engine, method: Method, lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    """The new tokens of prompts of these lengths, one after the other."""
    rows = (begun(engine, tokens(length, length), method, length) for length in lengths)
    return [text for row in rows for text in continued(engine, [row])]


def pairs(engine: Engine) -> list[list[int]]:
    """The new tokens of three dense batches of two prompts, of other lengths each time, and once of the same."""
    found = []
    for lengths in ((5, 12), (9, 7), (8, 8)):
        rows = [begun(engine, tokens(length, place), DENSE, place) for place, length in enumerate(lengths)]
        found += continued(engine, rows)
    return found


# -- graphs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("family", ONE_PER_LAYOUT)
def test_prompts_of_all_lengths_share_the_graphs_of_the_first_one(family: str, method: Method) -> None:
    model = tiny(family)
    graphs = Graphs(model)
    engine = Engine(model, compiled=graphs.call)
    first = texts(engine, method, LENGTHS[:1])
    # Verified: drafts; the check, with and without hooks having been there.
    assert graphs.count <= (3 if method.verified else 1)
    before = graphs.count
    assert [*first, *texts(engine, method, LENGTHS[1:])] == texts(Engine(model), method)
    assert graphs.count == before


def test_batches_of_all_lengths_share_one_graph() -> None:
    model = tiny("llama")
    graphs = Graphs(model)
    assert pairs(Engine(model, compiled=graphs.call)) == pairs(Engine(model))
    assert graphs.count == 1


def test_every_sparsity_keeps_its_graph() -> None:
    model = tiny("llama")
    graphs = Graphs(model)
    engine = Engine(model, compiled=graphs.call)
    sparsities = [number / 12 for number in range(12)]  # more of them than torch allows variants by default
    for _ in range(2):
        for sparsity in sparsities:
            texts(engine, Method(sparsity=sparsity), LENGTHS[:1])
        assert graphs.count == len(sparsities)


@pytest.mark.parametrize("family", ONE_PER_LAYOUT)
def test_logits_are_those_of_the_model_as_it_is_up_to_rounding(family: str) -> None:
    model = tiny(family)
    seen: dict[bool, list[Tensor]] = {True: [], False: []}
    for compiled in (True, False):

        def pick(rows: Sequence[Row], logits_BV: Tensor, mine: list[Tensor] = seen[compiled]) -> Tensor:
            mine.append(logits_BV.clone())
            return torch.full((len(rows),), 3)

        engine = Engine(model, compiled=Graphs(model).call if compiled else None)
        for method in (DENSE, RECIPE):
            continued(engine, [begun(engine, tokens(9), method)], pick=pick)
    assert difference(torch.stack(seen[True]), torch.stack(seen[False])) < TOLERANCE


def test_a_graph_break_and_a_changed_shape_would_tell() -> None:
    model = fresh("llama")
    engine = Engine(model, compiled=(graphs := Graphs(model)).call)
    for length in LENGTHS[:2]:
        continued(engine, [begun(engine, tokens(length), GRIFFIN)], longest=length)  # a larger cache
    assert graphs.count == 2
    model.model.layers[0].register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    with pytest.raises(torch._dynamo.exc.Unsupported):
        texts(engine, GRIFFIN)


# -- addresses and memory ---------------------------------------------------------------------------------------------


def addresses(engine: Engine) -> list[int]:
    """Of the experts' weights and biases, and of the keys, values and lengths of all caches."""
    parameters = [
        value
        for projections in engine._compact._compact.values()
        for projection in projections
        for value in projection._compact.values()
        if isinstance(value, Tensor)
    ]
    layers = [layer for cache in engine._caches.values() for layer in cache.layers]
    cached = [tensor for layer in layers for tensor in (layer.keys, layer.values, layer.cumulative_length)]
    return [tensor.data_ptr() for tensor in (*parameters, *cached)]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("family", ONE_PER_LAYOUT)
def test_weights_biases_and_caches_stay_where_they_are(family: str, method: Method) -> None:
    engine = Engine(tiny(family), compiled=tiny(family))
    found = []
    for length in LENGTHS:
        texts(engine, method, [length])
        found.append(addresses(engine))
    assert len(found[0]) > 6
    assert found[0] == found[1] == found[2]


def test_a_new_buffer_would_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[nn.Parameter] = []

    def fresh_buffer(self: executors.CompactProjection, name: str, memory: str, shape: list[int]) -> nn.Parameter:
        self._compact[name] = parameter = nn.Parameter(self._weight().new_empty(shape), requires_grad=False)
        kept.append(parameter)  # else the next one may have its address
        return parameter

    monkeypatch.setattr(executors.CompactProjection, "_buffer", fresh_buffer)
    engine = Engine(tiny("llama"), compiled=tiny("llama"))
    found = []
    for length in LENGTHS:
        texts(engine, GRIFFIN, [length])
        found.append(addresses(engine))
    assert found[0] != found[1]


def living() -> int:
    """Bytes of all tensors that there are."""
    gc.collect()
    storages = {
        one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
        for one in gc.get_objects()
        if issubclass(type(one), Tensor) and not isinstance(one, FakeTensor)
    }
    return sum(storages.values())


def memory(engine: Engine, method: Method, run: Callable[..., Any] = texts) -> list[int]:
    """After two prompts, and after five more, of which the last one is as long: its experts are kept."""
    found = []
    for lengths in ((12, 9), (5, 12, 7, 11, 9)):
        run(engine, method, lengths)
        found.append(living())
    return found


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_memory_does_not_grow_with_prompts(method: Method) -> None:
    before, after = memory(Engine(tiny("llama"), compiled=tiny("llama")), method)
    assert after == before


def test_memory_that_grows_would_tell() -> None:
    kept = []

    def keeping(engine: Engine, method: Method, lengths: Sequence[int]) -> None:
        for length in lengths:
            kept.append(prefilled(engine, tokens(length), method))

    before, after = memory(Engine(tiny("llama"), compiled=tiny("llama")), GRIFFIN, keeping)
    assert after > before


# -- the host ---------------------------------------------------------------------------------------------------------


def without_values(method: Method, family: str, monkeypatch: pytest.MonkeyPatch, pick: Any = greedy) -> int:
    """Run a prompt on tensors that have no values, so that asking for one fails. The one place where the host reads
    tokens is given some.

    Returns:
        How often it has read them.
    """
    reads = []

    def on_host(steps: Sequence[Tensor]) -> list[list[int]]:
        reads.append(len(steps))
        return [[3] * len(step_B) for step_B in steps]

    monkeypatch.setattr(decoding, "on_host", on_host)
    prompts = [tokens(length, length) for length in (12, 9)]
    with FakeTensorMode():
        with torch.device(DEVICE):
            model: PreTrainedModel = fresh(family)
        engine = Engine(model, compiled=model)
        states = [prefilled(engine, ids, method) for ids in prompts]
        for state in states:
            rows = begin(engine, [state], method)
            generation = Generation(LIMIT, pick, never)
            assert [len(row.tokens) for row in decode(engine, rows, 1, 1, 12, generation)] == [LIMIT]
    return len(reads)


@pytest.mark.parametrize("method", [DENSE, GRIFFIN, RECIPE], ids=["dense", "griffin", "recipe"])
@pytest.mark.parametrize("family", ONE_PER_LAYOUT)
def test_the_host_waits_only_where_it_reads_tokens(
    family: str, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = without_values(method, family, monkeypatch)
    # Two prompts of 21 tokens, eight at a time; the recipe's refreshes after 8 and 16 tokens come with a read each.
    assert reads == (8 if method is RECIPE else 6)


def test_nor_where_tokens_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawing(rows: Sequence[Row], logits_BV: Tensor) -> Tensor:
        return torch.cat([logits_V.softmax(dim=-1).multinomial(1) for logits_V in logits_BV])

    assert without_values(GRIFFIN, "llama", monkeypatch, drawing) == 6


def test_a_host_that_waits_would_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def waiting(rows: Sequence[Row], logits_BV: Tensor) -> Tensor:
        return torch.tensor([int(logits_V.argmax().item()) for logits_V in logits_BV])

    with pytest.raises(DataDependentOutputException):
        without_values(GRIFFIN, "llama", monkeypatch, waiting)
