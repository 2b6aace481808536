"""Statistics of single tokens: against hooks of the test's own, in every layout, alone and beside other rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from engines import TOLERANCE, begun, generated, refuse_parting, tokens
from families import ONE_PER_LAYOUT, WIDTHS, tiny
from prompts import prompt
from running import difference, generate, step_logits
from torch import Tensor, nn
from transformers import PreTrainedModel

import griffin
from griffin import TOKEN_STATISTICS, Engine, Method, find_feedforward_blocks, kept_neurons, traffic
from griffin.token_statistics import gate_activations

SPARSITY = 0.6
GATED = ("llama", "phi3")
LIMIT = 8


def activation(model: PreTrainedModel, name: str) -> nn.Module:
    """The activation function of a gated block, by the names that these architectures give it."""
    module = model.get_submodule(name)
    found: nn.Module = getattr(module, "act_fn", None) or module.activation_fn
    return found


@contextmanager
def reference(model: PreTrainedModel, statistic: str, family: str) -> Iterator[None]:
    """Keep each token's own neurons of every call, written down anew."""
    handles = []
    for block in find_feedforward_blocks(model):
        seen: dict[str, Tensor] = {}

        def see_input(module: nn.Module, args: tuple[Tensor, ...], seen: dict[str, Tensor] = seen) -> None:
            seen["x"] = args[0]

        def mask(module: nn.Module, args: tuple[Tensor, ...], block=block, seen=seen) -> Tensor:
            z = args[0]
            if statistic == "cats" and family in GATED:
                gate = block.inputs[0](seen["x"])
                gate = gate.chunk(2, dim=-1)[0] if family == "phi3" else gate
                scores = activation(model, block.name)(gate).abs()
            elif statistic == "wina":
                weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
                scores = z.abs() * weight.norm(dim=0)
            else:
                scores = z.abs()
            least = scores.topk(kept_neurons(block.width, SPARSITY), dim=-1).values[..., -1:]
            return torch.where(scores >= least, z, 0.0)

        handles.append(block.inputs[0].register_forward_pre_hook(see_input))
        handles.append(block.output.register_forward_pre_hook(mask))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("family", ONE_PER_LAYOUT)
@pytest.mark.parametrize("statistic", TOKEN_STATISTICS)
def test_what_is_generated_is_what_the_reference_generates(family: str, statistic: str) -> None:
    model, method = tiny(family), Method(statistic, sparsity=SPARSITY)
    engine = Engine(model)
    rows = [begun(engine, tokens(9, seed), method, seed) for seed in range(2)]
    found = generated(engine, rows, 2, LIMIT, most=2)
    for seed in range(2):
        output = model(torch.tensor([tokens(9, seed)]))
        logits, cache = [output.logits[0, -1]], output.past_key_values
        with reference(model, statistic, family):
            while len(logits) < LIMIT:
                output = model(logits[-1].argmax().view(1, 1), past_key_values=cache)
                logits.append(output.logits[0, -1])
        texts = [int(one.argmax()) for one in logits]
        assert refuse_parting(found[seed], (texts, torch.stack(logits))) == 0


@pytest.mark.parametrize("statistic", TOKEN_STATISTICS)
def test_rows_of_other_methods_beside_do_not_matter(statistic: str) -> None:
    engine, methods = Engine(tiny("llama")), [Method(statistic), Method("griffin"), Method(sparsity=0.0)]
    together = generated(engine, [begun(engine, tokens(9), one, one) for one in methods], 3, LIMIT, most=3)
    for method in methods:
        alone = generated(engine, [begun(engine, tokens(9), method, method)], 1, LIMIT)
        refuse_parting(together[method], alone[method])


@pytest.mark.parametrize("statistic", TOKEN_STATISTICS)
def test_prune_generates_what_the_engine_generates_and_restores_the_model(statistic: str) -> None:
    model, ids_1S = tiny("llama"), prompt(9)
    before = generate(model, ids_1S)
    with griffin.prune(model, SPARSITY, statistic, mode="masked") as pruner:
        output = generate(model, ids_1S, max_new_tokens=LIMIT)
        for what in ("scores", "experts"):
            with pytest.raises(RuntimeError, match="each token has scores and experts of its own"):
                getattr(pruner, what)
    engine = Engine(model)
    found = generated(engine, [begun(engine, ids_1S[0].tolist(), Method(statistic, sparsity=SPARSITY))], 1, LIMIT)[None]
    refuse_parting((output.sequences[0, 9:].tolist(), step_logits(output)), found)
    after = generate(model, ids_1S)
    assert torch.equal(step_logits(before), step_logits(after))


def test_the_gate_is_found_from_what_it_was_multiplied_with() -> None:
    gate_SD, up_SD = torch.randn(3, 5), torch.randn(3, 5)
    up_SD[1, 2] = 0.0
    expected = gate_SD.abs()
    expected[1, 2] = 0.0
    assert difference(gate_activations(gate_SD * up_SD, up_SD), expected) < TOLERANCE


@pytest.mark.parametrize("family", ONE_PER_LAYOUT)
def test_bytes_are_those_behind_what_a_neuron_is_known_from(family: str) -> None:
    model = tiny(family)
    kept = [kept_neurons(WIDTHS[family], SPARSITY)] * 3
    whole = traffic(model, kept)
    share = {
        name: (whole.dense - traffic(model, kept, one).pruned) / (whole.dense - whole.pruned)
        for name, one in TOKEN_STATISTICS.items()
    }
    if family in GATED:
        assert share == pytest.approx({"teal": 1 / 3, "wina": 1 / 3, "cats": 2 / 3}, rel=0.02)
    else:
        assert share == pytest.approx(dict.fromkeys(TOKEN_STATISTICS, 1 / 2), rel=0.02)


@pytest.mark.parametrize(
    "options",
    [{"compensation": "ridge"}, {"refresh": "experts"}, {"selection": "sample"}, {"verification": "exact"}],
)
def test_what_tokens_that_choose_for_themselves_cannot_have_is_refused(options: dict[str, str]) -> None:
    (key,) = options
    with pytest.raises(ValueError, match=f"{key}='.*' with statistic='teal'.*expected {key}="):
        Method("teal", **options)


@pytest.mark.parametrize(
    ("options", "words"), [({}, "expected 'masked'"), ({"mode": "masked", "shared_experts": True}, "shared")]
)
def test_compact_weights_are_refused(options: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        griffin.prune(tiny("llama"), 0.5, "cats", **options)


def test_the_label_says_that_it_is_masked() -> None:
    assert Method("teal").label == "teal (by token, masked) 50%"
