"""Flocking: the measures by their formulas, the runs by the model's own activations."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from calling import ARTICLES, Entry, composed, ran, read_record, read_samples, write_rows

import griffin
from pipelines.models import LoadedModel, load
from pipelines.records import read_arrays
from pipelines.tasks.flocking import _controls, read
from pipelines.tasks.flocking_figures import TEXTS, between_sequences, chance, jaccard, sets_of
from pipelines.tracking import Media


def options(out: Path, *more: str) -> list[str]:
    plain = ["model=random_tiny", "task=flocking", "limit=3", f"output_dir={out}", "wandb.mode=offline"]
    return [*plain, "task.sequence_length=48", "task.max_new_tokens=5", *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one finished run, to be read and not to be changed."""
    (folder,) = ran(*options(tmp_path_factory.mktemp("flocking") / "out"))
    return folder


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    """The model of all runs."""
    return load(composed("model=random_tiny").model, "cpu", 0)


def arrays_of(folder: Path, index: int) -> dict[str, np.ndarray]:
    arrays = read_arrays(folder / "arrays" / f"{index}.npz")
    assert arrays is not None
    return arrays


def test_jaccard_is_shared_over_all_and_chance_is_what_random_sets_have() -> None:
    one, other = np.array([1, 1, 0, 0], bool), np.array([0, 1, 1, 0], bool)
    assert [jaccard(one, other), jaccard(one, one), jaccard(one, ~one)] == pytest.approx([1 / 3, 1, 0])
    assert jaccard(np.zeros(4, bool), np.zeros(4, bool)) == 1.0
    drawn = np.random.default_rng(0).random((200, 4000)).argsort(axis=1) < 1000
    assert jaccard(drawn[::2], drawn[1::2]).mean() == pytest.approx(chance(0.25), rel=0.01)


def test_between_sequences_is_the_mean_over_pairs_with_the_jackknifes_error() -> None:
    sets_NLD = np.random.default_rng(0).random((5, 3, 40)) < 0.4
    means, errors = between_sequences(sets_NLD, sets_NLD)

    def mean(rows: list[int]) -> np.ndarray:
        pairs = [jaccard(sets_NLD[i], sets_NLD[j]) for i, j in itertools.combinations(rows, 2)]
        return np.array([*np.mean(pairs, axis=0), np.mean(pairs)])

    assert means == pytest.approx(mean([0, 1, 2, 3, 4]))
    without = np.array([mean([row for row in range(5) if row != left]) for left in range(5)])
    assert errors == pytest.approx(np.sqrt(4 / 5 * ((without - means) ** 2).sum(axis=0)))


def test_pairs_of_two_kinds_never_match_a_sequence_with_itself() -> None:
    one = np.eye(3, 6, dtype=bool)[:, None]
    other = np.roll(one, 1, axis=0)  # every set is another sequence's
    assert between_sequences(one, one)[0] == pytest.approx([0.0, 0.0])
    assert between_sequences(one, other)[0] == pytest.approx([0.5, 0.5])
    assert between_sequences(one[:2], one[:2])[1] == pytest.approx([0.0, 0.0])


def test_a_run_measures_the_models_own_experts(whole: Path, loaded: LoadedModel) -> None:
    config = composed(*options(whole.parent))
    for sample, text in zip(read_samples(whole), read(config), strict=True):
        arrays, ids = arrays_of(whole, sample["index"]), loaded.encode(text.text)[:48]
        assert sample["prompt_tokens"] == len(ids)
        prompts = dict(zip(TEXTS, (ids, *_controls(loaded, ids, config.seed, text.index)), strict=True))
        for name, tokens in prompts.items():
            with griffin.prune(loaded.model, 0.5, mode="masked") as pruner, torch.no_grad():
                loaded.model(torch.tensor([tokens]))
                experts, scores = pruner.experts, pruner.scores
            sets = np.unpackbits(arrays[f"{name}_sets"], axis=-1).astype(bool)
            for layer, expert_1K in enumerate(experts):
                assert np.flatnonzero(sets[layer]).tolist() == expert_1K[0].tolist()
                assert arrays[f"{name}_scores"][layer] == pytest.approx(scores[layer][0].numpy(), rel=1e-5)
                energy = scores[layer][0].square()[expert_1K[0]].sum() / len(tokens)
                assert sample["kept_energy"][name][layer] == pytest.approx(float(energy), rel=1e-4)
                assert sample["token_energy"][name][layer] >= sample["kept_energy"][name][layer]


def test_the_generation_is_the_dense_models_own(whole: Path, loaded: LoadedModel) -> None:
    sample, arrays = read_samples(whole)[0], arrays_of(whole, 0)
    ids = torch.tensor([loaded.encode(read(composed(*options(whole.parent)))[0].text)[:48]])
    greedy = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [1]}
    text = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)
    seen: list[torch.Tensor] = []
    blocks = griffin.find_feedforward_blocks(loaded.model)
    hook = blocks[1].output.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        loaded.model(text[:, : 48 + 5])
    hook.remove()
    z_SD = seen[0][48:]
    scores_D = (z_SD / z_SD.norm(dim=-1, keepdim=True)).norm(dim=0)
    natural, generated = (
        np.unpackbits(arrays[f"natural_sets{part}"], axis=-1).astype(bool) for part in ("", "_generation")
    )
    assert set(np.flatnonzero(generated[1])) == set(scores_D.topk(80).indices.tolist())
    assert sample["jaccard_generation"]["natural"] == pytest.approx(jaccard(natural, generated), abs=1e-6)
    assert "permuted_sets_generation" not in arrays


def test_the_record_is_the_mean_of_what_the_samples_say(whole: Path) -> None:
    record, samples = read_record(whole), read_samples(whole)
    metrics = record["metrics"]
    assert record["config"]["sparsity"] == 0.0
    for text in TEXTS:
        halves = [sum(sample["jaccard_halves"][text]) / 3 for sample in samples]
        assert metrics[f"jaccard_halves_{text}"] == pytest.approx(sum(halves) / 3)
        assert 0 < metrics[f"jaccard_sequences_{text}"] < 1
        assert metrics[f"jaccard_other_halves_{text}_stderr"] > 0
    with_arrays = [{"arrays": arrays_of(whole, index)} for index in range(3)]
    means, _ = between_sequences(*[sets_of(with_arrays, "natural_sets")] * 2)
    assert metrics["jaccard_sequences_natural"] == pytest.approx(means[-1])
    assert not any(isinstance(value, float) and math.isnan(value) for value in metrics.values())


def test_what_is_to_be_looked_at_is_in_the_run_folder(whole: Path) -> None:
    names = {path.stem for path in (whole / "figures").glob("*.png")}
    assert names == {path.stem for path in (whole / "figures").glob("*.pdf")}
    assert {"jaccard_sequences", "jaccard_halves", "jaccard_generation", "scores"} < names
    assert {"heatmap", "heatmap_sorted"} < names
    heatmaps = [{name for name in arrays_of(whole, index) if "heatmap" in name} for index in range(3)]
    assert heatmaps == [{f"{text}_heatmap" for text in TEXTS}, {"natural_heatmap"}, set()]
    heat_LTM = arrays_of(whole, 0)["natural_heatmap"]
    assert heat_LTM.shape == (3, 48, 128)
    assert heat_LTM.min() >= 0
    assert ((heat_LTM.astype(np.float64) ** 2).sum(axis=-1) <= 1.001).all()
    rows = (whole / "layers.csv").read_text(encoding="utf-8").splitlines()
    assert rows[0] == "layer,text,measure,value,stderr"
    assert len(rows) == 1 + 3 * (7 + 5 + 5)


@pytest.mark.parametrize("bos", [False, True])
def test_controls_have_the_same_tokens_or_none_of_the_special_ones(bos: bool, loaded: LoadedModel) -> None:
    model = replace(loaded, add_bos_token=bos)
    ids = model.encode(ARTICLES[1])
    permuted, drawn = _controls(model, ids, 0, 3)
    assert permuted != ids
    assert sorted(permuted) == sorted(ids)
    assert len(drawn) == len(ids)
    specials = set(loaded.tokenizer.all_special_ids)
    for control in (permuted, drawn):
        assert control[:bos] == ids[:bos] == [loaded.tokenizer.bos_token_id][:bos], "a BOS token stays in front"
        assert not set(control[bos:]) & specials
    assert (permuted, drawn) == _controls(model, ids, 0, 3)
    assert (permuted, drawn) != _controls(model, ids, 0, 4)
    assert (permuted, drawn) != _controls(model, ids, 1, 3)


def test_a_text_file_is_cut_into_sequences_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.tasks.flocking.media", lambda *_: Media())
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Sentence number {number} of the text. " for number in range(100)), encoding="utf-8")
    samples = read_samples(ran(*options(tmp_path / "out", f"task.data_files={path}"))[0])
    assert [sample["prompt_tokens"] for sample in samples] == [48] * 3
    # Bytes are tokens here, so the stretches are all different.
    assert len({str(sample["kept_energy"]["natural"]) for sample in samples}) == 3


def test_json_lines_give_a_sequence_a_row_and_short_ones_are_skipped(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"document": ARTICLES[0]}, {"document": "short"}])
    one_layer = "model.architecture.num_hidden_layers=1"  # each has its figures
    (folder,) = ran(*options(tmp_path / "out", f"task.data_files={path}", "task.text_field=document", one_layer))
    metrics = read_record(folder)["metrics"]
    assert (metrics["samples"], metrics["skipped_prompts"]) == (1, 1)
    assert "jaccard_halves_natural" in metrics
    assert "jaccard_sequences_natural" not in metrics  # takes two


def test_the_method_counts_for_nothing(whole: Path, call: Entry) -> None:
    ended = call(*options(whole.parent, "grid.statistic=[magnitude,random]", "grid.sparsity=[0.5,0.75]"))
    assert ended.code == 0
    assert len(ended.lines(str(whole))) == 1  # finished before, skipped
    assert "others' halves" in ended.out
