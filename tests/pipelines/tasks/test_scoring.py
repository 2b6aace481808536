"""Log-likelihoods under experts: equal to a literal reading of the method, in any batch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from calling import composed, tiny
from torch import Tensor

import griffin
from pipelines.methods import Method
from pipelines.models import LoadedModel, load
from pipelines.task_config import PROTOCOLS
from pipelines.tasks import scoring
from pipelines.tasks.scoring import Request, Score

DENSE = Method("griffin", "topk", 0.0)
GRIFFIN = Method("griffin", "topk", 0.5)
MAGNITUDE = Method("magnitude", "topk", 0.5)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    config = composed(*tiny(tmp_path_factory.mktemp("model") / "out"))
    model = load(config.model, "cpu", 0)
    for parameter in model.model.parameters():  # random weights barely tell one continuation from another
        parameter.mul_(3.0)
    return model


def requests() -> list[Request]:
    """Long and short contexts and continuations, mixed; some share all but the last token."""
    numbers = torch.Generator().manual_seed(0)
    sizes = [(30, 4), (3, 9), (17, 1), (2, 1), (45, 2), (12, 1), (12, 1), (1, 3)]
    drawn = [torch.randint(2, 250, (sum(size),), generator=numbers).tolist() for size in sizes]
    drawn[6][:12] = drawn[5][:12]
    return [Request(tuple(ids[:context]), tuple(ids[context:])) for ids, (context, _) in zip(drawn, sizes, strict=True)]


def score(
    loaded: LoadedModel, asked: list[Request], methods: list[Method], protocol: str, batch_size: int = 1
) -> dict[Method, list[Score]]:
    options: dict[str, Any] = {"protocol": protocol, "context_length": loaded.context_length, "batch_size": batch_size}
    batches = scoring.score(griffin.Engine(loaded.model), asked, methods, seed=0, **options)
    scores = {(method, number): one for batch in batches for method, number, one in batch}
    return {method: [scores[method, number] for number in range(len(asked))] for method in methods}


@contextmanager
def literal(model: Any, request: Request, method: Method, protocol: str) -> Iterator[Tensor]:
    """Section 2 of the method, read word for word: one pass over context and continuation without the last token,
    the statistic from the prompt's positions, the mask on the others. Yields the tokens of that pass."""
    ids = (request.context + request.continuation)[:-1]
    prompt = len(ids) - 1 if protocol == "paper" else len(request.context)

    def hook(mlp: Any) -> Any:
        def mask(_: Any, arguments: tuple[Tensor]) -> tuple[Tensor]:
            z = arguments[0].clone()
            if method.statistic == "griffin":
                before = z[0, :prompt]
                scores = (before / before.norm(dim=-1, keepdim=True)).norm(dim=0)
            else:
                scores = mlp.gate_proj.weight.norm(dim=1) * mlp.up_proj.weight.norm(dim=1)
            kept = set(scores.argsort(descending=True)[: int(z.shape[-1] * (1 - method.sparsity))].tolist())
            z[:, prompt:, [neuron for neuron in range(z.shape[-1]) if neuron not in kept]] = 0
            return (z,)

        return mask

    handles = [layer.mlp.down_proj.register_forward_pre_hook(hook(layer.mlp)) for layer in model.model.layers]
    try:
        yield torch.tensor([ids])
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("method", [GRIFFIN, MAGNITUDE], ids=lambda method: method.statistic)
def test_every_request_agrees_with_a_literal_reading(loaded: LoadedModel, method: Method, protocol: str) -> None:
    found = score(loaded, requests(), [method], protocol)[method]
    for request, one in zip(requests(), found, strict=True):
        with literal(loaded.model, request, method, protocol) as ids, torch.no_grad():
            logprobs = loaded.model(ids).logits[0, -len(request.continuation) :].log_softmax(dim=-1)
        tokens = torch.tensor(request.continuation)
        assert one.loglikelihood == pytest.approx(float(logprobs[range(len(tokens)), tokens].sum()), rel=1e-5)
        assert one.greedy == bool((logprobs.argmax(dim=-1) == tokens).all())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_batch_gives_each_request_what_it_gets_alone(loaded: LoadedModel, protocol: str) -> None:
    methods = [DENSE, GRIFFIN, MAGNITUDE]
    alone = score(loaded, requests(), methods, protocol)
    batch = score(loaded, requests(), methods, protocol, batch_size=8)
    for method in methods:
        for one, many in zip(alone[method], batch[method], strict=True):
            assert many.loglikelihood == pytest.approx(one.loglikelihood, rel=1e-5)
            assert many.greedy == one.greedy


def test_the_protocols_differ_where_they_should(loaded: LoadedModel) -> None:
    paper, continuation = (
        score(loaded, requests(), [DENSE, GRIFFIN], protocol, batch_size=4) for protocol in PROTOCOLS
    )
    for number, request in enumerate(requests()):
        dense = paper[DENSE][number].loglikelihood
        assert paper[GRIFFIN][number].loglikelihood != dense  # the last position is pruned, whatever comes before
        # A one-token continuation is predicted from the prompt, which is dense.
        same = continuation[GRIFFIN][number].loglikelihood == pytest.approx(dense, rel=1e-6)
        assert same == (len(request.continuation) == 1)


def test_methods_scored_together_equal_methods_scored_alone_to_the_bit(loaded: LoadedModel) -> None:
    methods = [DENSE, GRIFFIN, MAGNITUDE, Method("random", "sample", 0.25)]
    together = score(loaded, requests(), methods, "paper")
    for method in methods:
        assert score(loaded, requests(), [method], "paper")[method] == together[method]


@pytest.mark.parametrize(
    ("method", "protocol"), [(DENSE, "paper"), (GRIFFIN, "paper"), (GRIFFIN, "continuation")], ids=str
)
def test_log_likelihoods_are_summed_in_float32(method: Method, protocol: str, loaded: LoadedModel) -> None:
    half = replace(loaded, model=copy.deepcopy(loaded.model).to(torch.bfloat16))
    long = Request(tuple(range(2, 40)), tuple(range(60, 90)))
    ((found,),) = score(half, [long], [method], protocol).values()
    with literal(half.model, long, method, protocol) as ids:
        logits = half.model(ids).logits[0, -30:]
    exact, in_half = (
        float(kind.log_softmax(dim=-1)[range(30), long.continuation].sum()) for kind in (logits.float(), logits)
    )
    # Experts of a statistic in bfloat16 may be others in the literal reading.
    assert found.loglikelihood == pytest.approx(exact, rel=1e-6 if method.dense else 2e-3)
    assert in_half == float(torch.tensor(in_half).bfloat16())
    assert found.loglikelihood != float(torch.tensor(found.loglikelihood).bfloat16()), "not a number of 8 bits"


def test_sparsity_0_is_the_dense_model_to_the_bit(loaded: LoadedModel) -> None:
    dense = score(loaded, requests(), [DENSE], "paper")[DENSE]
    for request, one in zip(requests(), dense, strict=True):
        ids = torch.tensor([(request.context + request.continuation)[:-1]])
        logits = loaded.model(ids, logits_to_keep=len(request.continuation)).logits[0]
        tokens = torch.tensor(request.continuation)
        assert one.loglikelihood == float(logits.log_softmax(dim=-1)[range(len(tokens)), tokens].sum())


def test_what_does_not_fit_loses_tokens_on_the_left(loaded: LoadedModel) -> None:
    small = replace(loaded, context_length=10)
    long = Request(tuple(range(2, 40)), (50, 51))
    kept = Request(long.context[-9:], long.continuation)
    for method in (DENSE, GRIFFIN):
        cut = score(small, [long], [method], "paper")
        assert cut == score(small, [kept], [method], "paper")
