"""A model pruned once for all prompts: an ordinary checkpoint, with a card that says what the table at the end says."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from calling import ARTICLES, Outcome, ran, read_record, texts, tiny, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import griffin
from griffin.ridge import latest_rows
from pipelines import bake, models

RECIPE = ("method=recipe", "budget=uniform", "refresh=none")
METHOD = griffin.Method("joint", compensation="ridge")
Bake = Callable[..., Outcome]


@pytest.fixture
def baked(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Bake:
    """The command in this process, with six short prompts, into `tmp_path/out`; later overrides win."""
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": text, "number": 1} for text in ARTICLES])

    def call(*overrides: str) -> Outcome:
        plain = {"model": "random_tiny", "data_files": str(data), "out": str(tmp_path / "out"), "held": "2"}
        plain |= {"max_new_tokens": "4"} | dict(override.split("=", 1) for override in overrides)
        monkeypatch.setattr(sys, "argv", ["bake", *(f"{key}={value}" for key, value in plain.items())])
        code, message = 0, ""
        try:
            bake.main()
        except SystemExit as end:
            code, message = 1, f"{end.code}\n"
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err + message)

    return call


def numbers(text: str) -> list[str]:
    """The means and standard errors of a table, in order."""
    return re.findall(r"[+-]?\d\.\d{4} ± \d\.\d{4}", text)


@torch.no_grad()
def test_the_checkpoint_is_the_compact_model_and_its_card_says_what_was_measured(
    baked: Bake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[models.LoadedModel] = []
    load = models.load
    monkeypatch.setattr(models, "load", lambda *given: loaded.append(load(*given)) or loaded[0])
    ended = baked(*RECIPE, "limit=3", "offset=1")
    assert ended.code == 0, ended.err
    model, prompts = loaded[0].model, [loaded[0].encode(text) for text in ARTICLES]

    engine = griffin.Engine(model)
    states = griffin.prefill(engine, prompts, griffin.wanted([METHOD]))
    experts = griffin.choose(engine, states[1:4], METHOD)
    ids_1S = torch.tensor([prompts[5]])
    checkpoint = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert checkpoint.config.intermediate_size == 80
    torch.testing.assert_close(checkpoint(ids_1S).logits, griffin.compact_model(model, experts)(ids_1S).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(ARTICLES[5])["input_ids"] == prompts[5]

    model_kl: list[float] = []
    kl: dict[bool, list[float]] = {True: [], False: []}
    for state in states[4:]:
        text_1S = model.generate(torch.tensor([state.ids]), max_new_tokens=4, do_sample=False)
        dense_CV = model(text_1S).logits[0, state.length :].log_softmax(dim=-1)
        logprobs_CV = checkpoint(text_1S).logits[0, state.length :].log_softmax(dim=-1)
        model_kl.append(float((dense_CV.exp() * (dense_CV - logprobs_CV)).sum(dim=-1).mean()))
        for shared, row_KL in kl.items():
            (row,) = griffin.begin(engine, [state], METHOD, experts=experts if shared else None)
            ((_, logits_CV),) = griffin.score(engine, [(row, text_1S[0, state.length :].tolist())])
            row_KL.append(float((dense_CV.exp() * (dense_CV - logits_CV.log_softmax(dim=-1))).sum(dim=-1).mean()))
    told = numbers(ended.out)
    differences = [[one - own for one, own in zip(other, kl[False], strict=True)] for other in (model_kl, kl[True])]
    for place, row_KL in enumerate([model_kl, kl[True], kl[False], *differences]):
        mean, error = map(float, told[2 * place].split(" ± "))
        assert mean == pytest.approx(sum(row_KL) / 2, abs=6e-5)
        assert error == pytest.approx(abs(row_KL[0] - row_KL[1]) / 2, abs=6e-5)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert numbers(card) == told
    for fact in (
        "joint+ridge 50%",
        "random weights, seed 0",
        "3 prompts",
        "2 other prompts, along 8 tokens",
        "sha256:",
    ):
        assert fact in card
        assert fact in ended.out
    density = griffin.traffic(model, [80] * 3)
    assert f"{density.pruned / density.dense:.4f} of the dense model's weights" in card
    assert "`python -m pipelines.bake model=random_tiny " in card


def test_the_folder_runs_as_any_model(baked: Bake, tmp_path: Path) -> None:
    ended = baked("sparsity=0.25")
    model = [word for word in ended.out.splitlines()[-1].split() if word.startswith("model.")]
    assert model == ["model.source=hub", f"model.repo={tmp_path / 'out'}"]
    (folder,) = ran(*tiny(tmp_path / "runs", "sparsity=0", *model))
    assert read_record(folder)["metrics"]["samples"] == 3
    assert any(texts(folder))


def test_rows_of_many_prompts_are_thinned_evenly() -> None:
    ridge = griffin.COMPENSATIONS["ridge"]
    recorded = {ridge: (torch.arange(10.0).unsqueeze(1),), griffin.STATISTICS["griffin"].activations: (torch.ones(7),)}
    kept, scores = bake.thinned(recorded, 4).values()
    assert kept[0].flatten().tolist() == [0, 2, 5, 7]
    assert len(scores[0]) == 7
    assert [len(bake.thinned(recorded, share)[ridge][0]) for share in (0, 10, 600)] == [0, 10, 10]
    assert ridge.part is latest_rows


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("method=recipe",), ["budget=late: expected uniform", "one FF width", "refresh=compensation: expected none"]),
        (("method=recipe", "refresh=none"), ["budget=late: expected uniform"]),
        (("method=exact",), ["verification=exact: expected none"]),
        (("quantization=int8",), ["quantization=int8: expected none"]),
        (("draft_tokens=4",), ["draft_tokens=4: expected auto"]),
        (("method=teal",), ["statistic=teal"]),
        (("statistic=oracle",), ["statistic=oracle"]),
        (("sparsity=0.3,0.5",), ["sparsity=0.3,0.5: several values; expected one"]),
        (("statistic=grifin",), ["statistic=grifin", "did you mean griffin?"]),
        (("method=dense",), ["sparsity=0"]),
        (("sparsity=[0.5,0.5,0.5]",), ["sparsity=[0.5, 0.5, 0.5]: expected one number"]),
        (("data_files=none.jsonl",), ["data_files=none.jsonl: no such file"]),
        (("data_files=null",), ["data_files=: expected"]),
        (("out=null",), ["out=: expected"]),
        (("out=.",), ["out=.: exists"]),
        (("prompt_field=text",), ["line 1", "'text' is missing", "prompt"]),
        (("prompt_field=number",), ["line 1", "'number' is int"]),
        (("limit=5",), ["limit=5 with offset=0 and held=2", "6 rows"]),
        (("offset=4",), ["limit=null with offset=4 and held=2", "6 rows"]),
        (("held=1",), ["held=1: expected 2 or more"]),
        (("device=tpu",), ["device=tpu"]),
        (("held_rows=1",), ["held_rows: no such key (did you mean held?)"]),
        (("task.shots=1",), ["task"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_are_one_line_before_anything_is_loaded(
    baked: Bake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], named: list[str]
) -> None:
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("loaded a model"))
    baked(*overrides).refused(*named)
    assert not (tmp_path / "out").exists()


def test_an_architecture_whose_width_no_config_says_is_told(baked: Bake, tmp_path: Path) -> None:
    baked("model.architecture.model_type=bloom").refused("model=random_tiny", "no config for an FF width of 128")
    assert [*(tmp_path / "out").iterdir()] == []


def test_a_sweep_is_refused_and_help_lists_the_keys(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bake", "-m", "sparsity=0.3,0.5"])
    with pytest.raises(SystemExit, match="error: -m: expected one call"):
        bake.main()
    monkeypatch.setattr(sys, "argv", ["bake", "--help"])
    with pytest.raises(SystemExit, match="0"):
        bake.main()
    told = capfd.readouterr().out
    assert all(key in told for key in ("prompt_field", "held", "model.repo", "sparsity", "smollm2_135m"))
    assert not any(key in told for key in ("task.kind", "batch_size", "experiment"))
