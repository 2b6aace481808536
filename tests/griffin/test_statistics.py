"""The statistics, those of single tokens too, and the aggregation of a batch, against their formulas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import reference
import torch
from engines import begun, chosen, generated, prefilled, refuse_parting
from families import LAYERS, ONE_PER_LAYOUT, WIDTHS, fresh, tiny
from running import TOLERANCE, difference, generate, hooks, prompt, step_logits, tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

import griffin
from griffin import STATISTICS, TOKEN_STATISTICS, Engine, Evidence, FeedForwardBlock, Method, traffic
from griffin.activations import PrefillChunk, TokenPositions
from griffin.statistics import gate_activations

# Those that read the activations of a prompt and nothing else but weights.
READING = [name for name, one in STATISTICS.items() if one.activations is not None]
FORMULAS = [*(name for name in READING if name != "oracle"), "magnitude"]


def plain_block(width: int) -> FeedForwardBlock:
    torch.manual_seed(0)
    return FeedForwardBlock("mlp", (nn.Linear(4, width),), nn.Linear(width, 4), parts=1)


def activations(B: int, S: int, D: int) -> Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(1))


def score(statistic: str, z_BSD: Tensor, counted_BS: Tensor | None = None, *, chunks: int = 99) -> Tensor:
    """[B, D], from the activations of prompts, so many columns at a time."""
    (rows, _, width), one, total_BD = z_BSD.shape, STATISTICS[statistic], None
    if one.activations is None:
        return one.score(Evidence(plain_block(width)))
    before_B = torch.zeros(rows, dtype=torch.int64)
    for begin in range(0, z_BSD.shape[1], chunks):
        part_BSD, columns = z_BSD[:, begin : begin + chunks], slice(begin, begin + chunks)
        counted = None if counted_BS is None else counted_BS[:, columns]
        positions = TokenPositions(rows, part_BSD.shape[1], counted, before_B, begin)
        if counted is not None:
            part_BSD = part_BSD.masked_fill(~counted.unsqueeze(-1), 0.0)
        chunk = PrefillChunk(part_BSD, positions, torch.empty(*part_BSD.shape[:2], 4))
        part_BD = one.activations.part(chunk, plain_block(width))
        total_BD = part_BD if total_BD is None else one.activations.join(total_BD, part_BD, positions)
        before_B = before_B + positions.count_B
    return one.score(Evidence(plain_block(width), total_BD))


@pytest.mark.parametrize("statistic", [*READING, "magnitude"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 5), (1, 7, 1), (3, 1, 5), (3, 7, 5)])
def test_statistics_follow_their_formulas(statistic: str, shape: tuple[int, int, int]) -> None:
    z_BSD, block = activations(*shape), plain_block(shape[2])
    matrices = [block.inputs[0].weight.double()], block.output.weight.detach().double()
    expected_BD = torch.stack([reference.score(statistic, z_SD.double(), *matrices) for z_SD in z_BSD])
    torch.testing.assert_close(score(statistic, z_BSD).double().expand_as(expected_BD), expected_BD, rtol=1e-5, atol=0)
    assert torch.equal(z_BSD, activations(*shape)), "recording leaves the activations alone"


@pytest.mark.parametrize("statistic", READING)
def test_padding_zero_rows_and_chunks_change_nothing(statistic: str) -> None:
    z_BSD = activations(2, 7, 5)
    z_BSD[1, 4:] = 0  # the second row has four tokens
    expected = torch.cat([score(statistic, z_BSD[:1]), score(statistic, z_BSD[1:, :4])])
    padded_BSD = torch.cat([torch.full((2, 4, 5), 9.0), z_BSD, torch.full((2, 1, 5), torch.nan)], dim=1)
    columns = torch.arange(12)
    counted_BS = (columns >= 4) & (columns < torch.tensor([[11], [8]]))
    for chunks in (99, 3, 1):
        torch.testing.assert_close(score(statistic, padded_BSD, counted_BS, chunks=chunks), expected)
    assert torch.equal(score(statistic, torch.zeros(1, 2, 5)), torch.zeros(1, 5))


@torch.no_grad()
@pytest.mark.parametrize("statistic", FORMULAS)
@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "gpt2"])
def test_a_models_scores_follow_the_formulas(family: str, statistic: str) -> None:
    model, ids = tiny(family), prompt(7)
    with griffin.prune(model, statistic=statistic) as pruner:
        model(ids)
    for found_1D, expected_D in zip(pruner.scores, reference.scores(model, family, statistic, ids), strict=True):
        torch.testing.assert_close(found_1D[0].double(), expected_D, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("statistic", FORMULAS)
def test_half_precision_is_scored_in_float32(statistic: str, dtype: torch.dtype) -> None:
    model, ids = fresh("llama"), prompt(7)
    for layer in range(LAYERS):  # so that squares of activations overflow in float16
        reference.output_projection(model, "llama", layer).weight.data *= 1e-2
        model.get_submodule(reference.module_name("llama", layer)).up_proj.weight.data *= 1e3
    model = model.to(dtype)
    with griffin.prune(model, statistic=statistic) as pruner:
        model(ids)
    _, z = reference.run(model, "llama", ids)
    assert max(float(z_SD.abs().max()) for z_SD in z) > 256
    for found_1D, expected_D in zip(pruner.scores, reference.score_layers(model, "llama", statistic, z), strict=True):
        assert found_1D.dtype == torch.float32
        torch.testing.assert_close(found_1D[0].double(), expected_D, rtol=1e-5, atol=0)


@torch.no_grad()
def test_the_oracle_scores_what_comes_after_the_prompt() -> None:
    model, engine, oracle = tiny("llama"), Engine(tiny("llama")), Method("oracle", compensation="ridge")
    statistic = STATISTICS["oracle"].activations
    assert statistic not in griffin.wanted([oracle]), "the prompt is not what it reads"
    state = prefilled(engine, tokens(7), oracle)
    (later,) = griffin.prefill(engine, [tokens(5, 1)], [statistic])
    experts = chosen(engine, replace(state, continuation=later.recorded), oracle)
    _, z = reference.run(model, "llama", prompt(5, 1))
    for layer, neurons_K in enumerate(experts.neurons):
        scores_D = reference.score("oracle", z[layer], [], reference.output_matrix(model, "llama", layer))
        assert neurons_K.tolist() == reference.best(scores_D, 0.5)


@torch.no_grad()
@pytest.mark.parametrize("family", ONE_PER_LAYOUT)
def test_what_is_seen_gives_the_scores_of_pruning_and_changes_nothing(family: str) -> None:
    model, ids = tiny(family), prompt(9)
    before = model(ids).logits
    with griffin.record_activations(model, lambda layer, z_SD: (layer, z_SD)) as seen:
        assert torch.equal(model(ids).logits, before)
        model(ids[:, :2])
    assert torch.equal(model(ids).logits, before)
    with griffin.prune(model) as pruner:
        model(ids)
    for layer, ((whole, part), scores_BD) in enumerate(zip(seen, pruner.scores, strict=True)):
        assert (whole[0], part[0]) == (layer, layer)
        assert (whole[1].shape, part[1].shape) == ((9, WIDTHS[family]), (2, WIDTHS[family]))
        torch.testing.assert_close(griffin.relative_activations(whole[1]).square().sum(dim=0).sqrt(), scores_BD[0])
    with pytest.raises(ZeroDivisionError), griffin.record_activations(model, lambda layer, z_SD: 1 / 0):
        model(ids)
    assert hooks(model) == 0
    found = griffin.relative_activations(torch.tensor([[3.0, -4.0], [0.0, 0.0]]))
    assert torch.equal(found, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


SPARSITY = 0.6
GATED = ("llama", "phi3")
LIMIT = 8


def by_token(model: PreTrainedModel, statistic: str, family: str) -> Any:
    """A view that keeps each token's own neurons of every call, written down anew."""
    view: Any = griffin.view_of(model)
    for block in griffin.find_feedforward_blocks(view):
        seen: dict[str, Tensor] = {}

        def see_input(module: nn.Module, args: tuple[Tensor, ...], seen: dict[str, Tensor] = seen) -> None:
            seen["x"] = args[0]

        def mask(module: nn.Module, args: tuple[Tensor, ...], block=block, seen=seen) -> Tensor:
            z = args[0]
            scores = z.abs()
            if statistic == "cats" and family in GATED:
                gate, parent = block.inputs[0](seen["x"]), view.get_submodule(block.name)
                gate = gate.chunk(2, dim=-1)[0] if family == "phi3" else gate
                scores = (parent.activation_fn if family == "phi3" else parent.act_fn)(gate).abs()
            elif statistic == "wina":
                scores = scores * (module.weight if isinstance(module, nn.Linear) else module.weight.T).norm(dim=0)
            least = scores.topk(griffin.kept_neurons(block.width, SPARSITY), dim=-1).values[..., -1:]
            return torch.where(scores >= least, z, 0.0)

        block.inputs[0].register_forward_pre_hook(see_input)
        block.output.register_forward_pre_hook(mask)
    return view


@torch.no_grad()
@pytest.mark.parametrize("family", [*GATED, "gpt2"])
@pytest.mark.parametrize("statistic", TOKEN_STATISTICS)
def test_tokens_choose_as_the_reference_does_beside_rows_of_other_methods(family: str, statistic: str) -> None:
    model, method = tiny(family), Method(statistic, sparsity=SPARSITY)
    engine, methods = Engine(model), [method, method, Method(), Method(sparsity=0.0)]
    rows = [begun(engine, tokens(9, seed), one, seed) for seed, one in enumerate(methods)]
    found = generated(engine, rows, LIMIT, most=4)
    with griffin.prune(model, method, mode="masked") as pruner:
        output = generate(model, prompt(9), max_new_tokens=LIMIT)
        for what in ("scores", "experts"):
            with pytest.raises(RuntimeError):
                getattr(pruner, what)
    found["prune"] = output.sequences[0, 9:].tolist(), step_logits(output)
    for label, seed in ((0, 0), (1, 1), ("prune", 0)):
        output = model(prompt(9, seed))
        logits, cache = [output.logits[0, -1]], output.past_key_values
        view = by_token(model, statistic, family)
        while len(logits) < LIMIT:
            output = view(logits[-1].argmax().view(1, 1), past_key_values=cache)
            logits.append(output.logits[0, -1])
        refuse_parting(found[label], ([int(one.argmax()) for one in logits], torch.stack(logits)))


def test_the_gate_is_found_from_what_it_was_multiplied_with() -> None:
    gate_SD, up_SD = torch.randn(3, 5), torch.randn(3, 5)
    up_SD[1, 2] = 0.0
    expected = gate_SD.abs().index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(0.0))
    assert difference(gate_activations(gate_SD * up_SD, up_SD), expected) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_bytes_are_those_behind_what_a_neuron_is_known_from(family: str) -> None:
    model, kept = tiny(family), [griffin.kept_neurons(WIDTHS[family], SPARSITY)] * 3
    whole = traffic(model, kept)
    thirds = {"teal": 1 / 3, "wina": 1 / 3, "cats": 2 / 3}
    expected = thirds if family in GATED else dict.fromkeys(thirds, 1 / 2)
    for name, one in TOKEN_STATISTICS.items():
        saved = whole.dense - traffic(model, kept, one).pruned
        assert saved / (whole.dense - whole.pruned) == pytest.approx(expected[name], rel=0.02)


@pytest.mark.parametrize("key", ["compensation", "refresh", "selection", "verification"])
def test_what_tokens_that_choose_for_themselves_cannot_have_is_refused(key: str) -> None:
    value = {"compensation": "ridge", "refresh": "experts", "selection": "sample", "verification": "exact"}[key]
    with pytest.raises(ValueError, match=f"{key}='{value}' with statistic='teal'.*expected {key}="):
        Method("teal", **{key: value})
    for options, words in (({}, "expected 'masked'"), ({"mode": "masked", "shared_experts": True}, "shared")):
        with pytest.raises(ValueError, match=words):
            griffin.prune(tiny("llama"), statistic="cats", **options)
