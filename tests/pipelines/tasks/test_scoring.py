"""Given texts read with experts: log-likelihoods in any batch, perplexity and fidelity, against plain forward calls."""

import copy
import functools
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calling import TEXT, composed, ran, read_record, read_samples, tiny
from torch import Tensor

import griffin
from pipelines.methods import Method
from pipelines.models import LoadedModel, load
from pipelines.task_config import PROTOCOLS
from pipelines.tasks import scoring
from pipelines.tasks.answers import predicted
from pipelines.tasks.fidelity import acceptance, compare
from pipelines.tasks.prompts import read
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


def by_pruner(model: Any, request: Request, method: Method, protocol: str = "continuation") -> Tensor:
    """The logits that the continuation is read with, by the pruner: the prompt dense, what follows with its experts."""
    ids = torch.tensor([(request.context + request.continuation)[:-1]])
    prompt = ids.shape[1] - 1 if protocol == "paper" else len(request.context)
    with griffin.prune(model, method, mode="masked"):
        found = model(ids[:, :prompt], use_cache=True)
        logits = found.logits[0]
        if prompt < ids.shape[1]:
            logits = torch.cat([logits, model(ids[:, prompt:], past_key_values=found.past_key_values).logits[0]])
    return logits[-len(request.continuation) :]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("method", [DENSE, GRIFFIN, MAGNITUDE], ids=lambda method: method.label)
@pytest.mark.parametrize("batch_size", [1, 8])
def test_every_request_agrees_with_the_pruner(
    batch_size: int, method: Method, protocol: str, loaded: LoadedModel
) -> None:
    found = score(loaded, requests(), [method], protocol, batch_size)[method]
    for request, one in zip(requests(), found, strict=True):
        logprobs = by_pruner(loaded.model, request, method, protocol).log_softmax(dim=-1)
        tokens = torch.tensor(request.continuation)
        assert one.loglikelihood == pytest.approx(float(logprobs[range(len(tokens)), tokens].sum()), rel=1e-5)
        assert one.greedy == bool((logprobs.argmax(dim=-1) == tokens).all())


@pytest.mark.parametrize(
    ("method", "protocol"), [(DENSE, "paper"), (GRIFFIN, "paper"), (GRIFFIN, "continuation")], ids=str
)
def test_log_likelihoods_are_summed_in_float32(method: Method, protocol: str, loaded: LoadedModel) -> None:
    half = replace(loaded, model=copy.deepcopy(loaded.model).to(torch.bfloat16))
    long = Request(tuple(range(2, 40)), tuple(range(60, 90)))
    ((found,),) = score(half, [long], [method], protocol).values()
    logits = by_pruner(half.model, long, method, protocol)
    exact, in_half = (
        float(kind.log_softmax(dim=-1)[range(30), long.continuation].sum()) for kind in (logits.float(), logits)
    )
    # Experts of a statistic in bfloat16 may be others by the pruner.
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


fidelity = functools.partial(tiny, task="fidelity", tokens=12)


def test_perplexity_of_every_cell_is_that_of_plain_calls(tmp_path: Path) -> None:
    lengths = ["task.prompt_lengths=[12,40]", "task.generation_lengths=[5,16]"]
    options = tiny(tmp_path / "out", *lengths, "statistic=wanda", task="perplexity")
    (folder,) = ran(*options)
    metrics = read_record(folder)["metrics"]
    assert metrics["samples"] == 3

    loaded = load(composed(*options).model, "cpu", 0)
    ids = loaded.encode(TEXT)
    for prompt, generation in itertools.product((12, 40), (5, 16)):
        losses = []
        for window in range(3):
            tokens = ids[window * 56 : (window + 1) * 56]
            request = Request(tuple(tokens[40 - prompt : 40]), tuple(tokens[40 : 40 + generation]))
            logits = by_pruner(loaded.model, request, Method("wanda"))
            losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(request.continuation))))
        name = f"perplexity_p{prompt}_g{generation}"
        assert metrics[name] == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)
        assert metrics[f"{name}_stderr"] > 0


def test_fidelity_is_the_kl_of_plain_calls(tmp_path: Path) -> None:
    options = fidelity(tmp_path / "out", rows=2, tokens=6)
    (folder,) = ran(*options)
    config = composed(*options)
    loaded = load(config.model, "cpu", 0)
    for sample, prompt in zip(read_samples(folder), read(config), strict=True):
        ids = torch.tensor([loaded.encode(prompt.text)])
        greedy = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        continuation = greedy[:, ids.shape[1] :]
        dense = loaded.model(greedy).logits[0, ids.shape[1] :].log_softmax(dim=-1)
        request = Request(tuple(ids[0].tolist()), (*continuation[0].tolist(), 0))
        pruned = by_pruner(loaded.model, request, GRIFFIN)[1:].log_softmax(dim=-1)
        kl = torch.nn.functional.kl_div(pruned, dense, log_target=True, reduction="batchmean")
        assert sample["kl"] == pytest.approx(float(kl), rel=1e-3)
        assert sample["top1_agreement"] == pytest.approx(
            float((dense.argmax(dim=-1) == pruned.argmax(dim=-1)).float().mean())
        )


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three methods on the same texts: dense, and pruned without and with refreshes."""
    grid = ["grid.sparsity=[0,0.5]", "compensation=ridge", "grid.refresh=[none,compensation]"]
    return ran(*fidelity(tmp_path_factory.mktemp("fidelity") / "out", *grid))


def test_what_follows_the_text_is_read_again_by_the_dense_model(together: list[Path]) -> None:
    dense, plain, refreshed = (read_record(folder)["metrics"] for folder in together)
    assert (dense["kl"], dense["top1_agreement"]) == (0.0, 1.0)
    assert len({plain["kl"], refreshed["kl"], 0.0}) == 3
    for before, sample in zip(*map(read_samples, together[1:]), strict=True):
        assert sample["kl_by_token"][:8] == pytest.approx(before["kl_by_token"][:8], abs=2e-6)
        assert sample["kl_by_token"][8] == pytest.approx(0, abs=2e-6) != before["kl_by_token"][8]


def test_every_pruned_method_is_judged_as_a_draft(together: list[Path]) -> None:
    assert "predicted_speedup" not in read_record(together[0])["metrics"]
    for folder in together[1:]:
        metrics, samples = read_record(folder)["metrics"], read_samples(folder)
        for sample in samples:
            bits = sample["agreement_by_token"]
            assert sum(bits) / len(bits) == pytest.approx(sample["top1_agreement"])
            assert 0 < sample["acceptance"] <= 1
            assert sample["draft_cost"] == samples[0]["draft_cost"] < 1
        best = predicted([sample["agreement_by_token"] for sample in samples], samples[0]["draft_cost"])
        assert {name: metrics[name] for name in best} == best


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_oracle_has_seen_the_text_that_it_is_judged_on(batch_size: int, tmp_path: Path) -> None:
    grid = ["grid.statistic=[griffin,oracle]", "sparsity=0.5", f"batch_size={batch_size}"]
    griffins, oracles = (read_record(folder)["metrics"] for folder in ran(*fidelity(tmp_path / "out", *grid)))
    assert 0 < oracles["kl"] < griffins["kl"]
    (alone,) = ran(*fidelity(tmp_path / "alone", "statistic=oracle", f"batch_size={batch_size}"))
    assert read_record(alone)["metrics"]["kl"] == pytest.approx(oracles["kl"], rel=1e-3 if batch_size > 1 else 0)


def test_compare_against_the_formula() -> None:
    dense = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]).log()
    pruned = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.2, 0.7]]).log()
    kl_C, agreement_C = compare(dense, pruned)
    assert kl_C.tolist() == pytest.approx([0.5 * math.log(2) - 0.25 * math.log(2), 0.0])
    assert agreement_C.tolist() == [0.0, 1.0]
    assert acceptance(dense, pruned) == pytest.approx((0.75 + 1.0) / 2), "the mass that both have"
