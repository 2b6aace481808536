"""A method as one argument of `model.generate`, and as a folder that is loaded like a repository of the hub."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from families import IDS, ROWS, fresh, pad, tiny
from running import text, unchanged
from transformers import PreTrainedModel, StaticCache

import griffin
from griffin import own_loop

METHODS: dict[str, dict[str, Any]] = {
    "griffin": {},
    "recipe": {"sparsity": 0.25},
    "exact": {"draft_tokens": 3},
    "int8": {},
    "int4": {},
}
each_method = pytest.mark.parametrize("name", METHODS)


def pruned(model: PreTrainedModel, name: str, *batch: Any, **options: Any) -> Any:
    """What `griffin.prune` gives."""
    mode = "compact" if name == "exact" or len(batch[0]) == 1 else "masked"
    with griffin.prune(model, name, mode=mode, **METHODS[name]):
        return text(model, *batch, **options)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@each_method
def test_one_argument_gives_the_texts_of_the_context(name: str, rows: int, static: bool) -> None:
    model, batch = tiny("llama"), pad(ROWS[:rows])
    options: dict[str, Any] = {"max_new_tokens": 12} | ({"cache_implementation": "static"} if static else {})
    decoding = griffin.decode_with(name, **METHODS[name])
    expected = pruned(model, name, *batch, **options)
    assert torch.equal(text(model, *batch, custom_generate=decoding, **options), expected)
    assert len(decoding.stats) == rows
    assert bool(decoding.drafts) == (name == "exact")
    if name == "exact":
        assert torch.equal(expected, text(model, *batch, **options))
        assert decoding.drafts[0].checks == len(decoding.drafts[0].widths)


@each_method
def test_sampling_processors_and_stopping_are_obeyed(name: str) -> None:
    model = tiny("llama")
    options: dict[str, Any] = {"do_sample": True, "top_k": 5, "repetition_penalty": 1.5, "max_new_tokens": 9}
    options["stopping_criteria"] = [lambda ids, scores, **_: torch.tensor([ids.shape[1] >= 17])]
    found = []
    for way in (lambda: pruned(model, name, IDS, **options), lambda: with_argument(model, name, **options)):
        torch.manual_seed(0)
        found.append(way())
    assert torch.equal(*found)
    assert found[0].shape[1] == 17


def with_argument(model: PreTrainedModel, name: str, **options: Any) -> Any:
    return text(model, IDS, custom_generate=griffin.decode_with(name, **METHODS[name]), **options)


def test_views_are_made_once_and_go_with_the_model() -> None:
    model, decoding = fresh("llama"), griffin.decode_with("exact")
    with unchanged(model):
        text(model, IDS, custom_generate=decoding)
        kept = own_loop._ENGINES[model][1]
        text(model, IDS, custom_generate=griffin.decode_with("griffin"))
        text(model, IDS, custom_generate=decoding)
        assert own_loop._ENGINES[model][1] is kept
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * -1.0)  # views share tensors: these are others
    expected = text(model, IDS)
    assert torch.equal(text(model, IDS, custom_generate=decoding), expected)
    assert own_loop._ENGINES[model][1] is not kept
    text(model, IDS, custom_generate=griffin.decode_with("int4"))  # attention is quantised once for all prompts
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(-3.0)  # as training does
    found = text(model, IDS, custom_generate=griffin.decode_with("int4"))
    assert torch.equal(found, pruned(model, "int4", IDS))
    gone = weakref.ref(model)
    del model, kept
    gc.collect()
    assert gone() is None


def test_a_folder_is_loaded_like_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    griffin.save_custom_generate(tmp_path)
    found = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"README.md", "config.json", "generate.py", "requirements.txt"}
    assert "- custom_generate" in (tmp_path / "README.md").read_text()
    model, options = tiny("llama"), {"custom_generate": str(tmp_path), "trust_remote_code": True}
    for name, more in METHODS.items():
        expected = pruned(model, name, IDS)
        assert torch.equal(text(model, IDS, method=name, **more, **options), expected)
    with pytest.raises(ValueError, match="trust_remote_code"):
        text(model, IDS, custom_generate=str(tmp_path))
    with pytest.raises(ValueError, match="sparsity=2"):
        text(model, IDS, sparsity=2, **options)


REFUSED: list[dict[str, Any]] = [
    *({name: 2, "do_sample": name != "num_beams"} for name in ("num_beams", "num_return_sequences")),
    {"position_ids": torch.ones_like(IDS)},
    {"inputs_embeds": torch.zeros(1, 11, 32)},
    {"output_attentions": True, "return_dict_in_generate": True},
    {"guidance_scale": 2.0},
]


@pytest.mark.parametrize("options", REFUSED, ids=lambda options: next(iter(options)))
@each_method
def test_what_cannot_be_honoured_is_refused_by_name(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        text(tiny("llama"), IDS, custom_generate=griffin.decode_with(name), **options)


def test_what_cannot_be_pruned_or_generated_with_is_refused() -> None:
    for wrong, words in (({"method": "nonesuch"}, "method='nonesuch'"), ({"statistic": "oracle"}, "cannot generate")):
        with pytest.raises(ValueError, match=words):
            griffin.decode_with(**wrong)
    with pytest.raises(TypeError, match="mode"):
        griffin.decode_with("griffin", mode="compact")
    model = fresh("llama")
    model.model.layers[1].mlp = torch.nn.Identity()
    with pytest.raises(griffin.UnsupportedModelError, match=r"layers\.1"):
        text(model, IDS, custom_generate=griffin.decode_with("griffin"))
    cache = StaticCache(tiny("llama").config, max_cache_len=64)
    output = text(tiny("llama"), IDS, past_key_values=cache, custom_generate=griffin.decode_with("exact"))
    assert torch.equal(output, text(tiny("llama"), IDS))
