"""Latency: that what is timed is what is named. How fast it is, is for the benchmark to say."""

import functools
from pathlib import Path
from statistics import median

import pytest
from calling import Entry, composed, ran, read_record, read_samples, run_folder, tiny

from pipelines.tasks.latency import metrics

latency = functools.partial(tiny, task="latency")


def test_one_pair_of_lengths_has_flat_metrics(call: Entry, tmp_path: Path) -> None:
    ended = call(*latency(tmp_path / "out"))
    assert ended.code == 0
    assert "decode speed-up" in ended.out
    assert "dense, over plain torch" in ended.out
    found = read_record(run_folder(tmp_path / "out"))["metrics"]
    assert {"decode_speedup", "decode_limit", "prompt_overhead", "compaction_vs_memcpy", "total_speedup"} <= set(found)
    assert found["decode_fraction_of_limit"] == pytest.approx(found["decode_speedup"] / found["decode_limit"])
    samples = read_samples(run_folder(tmp_path / "out"))
    assert len(samples) == 2
    assert all(sample["pruned"]["compact"] > 0 and sample["dense"]["decode"] > 0 for sample in samples)
    plain, dense = (median(sample[kind]["decode"] for sample in samples) for kind in ("plain", "dense"))
    assert found["onednn_speedup"] == pytest.approx(plain / dense)


@pytest.mark.parametrize("override", ["cpu_onednn=false", "model.dtype=bfloat16 batch_size=2 shared_experts=true"])
def test_several_pairs_have_a_suffix_each_and_without_onednn_nothing_is_compared_with_it(
    override: str, tmp_path: Path
) -> None:
    pairs = ["task.prompt_lengths=[8,12]", "task.repeats=1", "statistic=magnitude"]
    (folder,) = ran(*latency(tmp_path / "out", *pairs, *override.split()))
    found = read_record(folder)["metrics"]
    assert {"decode_speedup_p8_g9", "decode_speedup_p12_g9"} <= set(found)
    assert not {"decode_speedup", "onednn_speedup_p8_g9"} & set(found)
    assert "plain" not in read_samples(folder)[0]


def test_a_verified_method_is_timed_beside_itself_without_verification(tmp_path: Path) -> None:
    (folder,) = ran(*latency(tmp_path / "out", "verification=exact", "draft_tokens=2", "task.generation_lengths=[6]"))
    found = read_record(folder)["metrics"]
    assert found["decode_limit"] == found["predicted_speedup"] == pytest.approx(1 / found["effective_density"])
    assert found["pruned_decode_speedup"] > 0
    parts = sum(found[f"{part}_ms"] for part in ("draft", "check", "learn"))
    assert 0 < parts <= 1.2 * found["pruned_decode_ms"]
    for sample in read_samples(folder):
        assert sample["drafting"]["emitted"] == 6
        assert sample["unverified"]["decode"] > 0


def test_ratios_are_those_of_the_medians() -> None:
    def sample(index: int, factor: float) -> dict[str, object]:
        return {
            "index": index,
            "id": "p8_g10",
            "generation_length": 10,
            "dense": {"prefill": 1.0 * factor, "choose": 0.0, "compact": 0.0, "decode": 20.0 * factor},
            "pruned": {"prefill": 1.1 * factor, "choose": 0.2 * factor, "compact": 0.3 * factor, "decode": 10 * factor},
            "memcpy": 0.25 * factor,
            "bytes": {"dense": 250, "pruned": 100},
            "dense_peak_memory_bytes": 5,
            "peak_memory_bytes": 7,
        }

    found = metrics([sample(0, 1.0), sample(1, 100.0), sample(2, 1.0)])  # one disturbed repeat moves no median
    expected = {
        "decode_speedup": 2.0,
        "decode_limit": 2.5,
        "decode_fraction_of_limit": 0.8,
        "prompt_overhead": 0.6,
        "compaction_vs_memcpy": 1.2,
        "breakeven_tokens": 0.6,
        "total_speedup": 21 / 11.6,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("overrides", "prompts", "generations"),
    [
        (["device=cpu"], [256], [32]),
        (["device=cuda"], [2048], [128, 2048]),
        (["device=cuda", "task.prompt_lengths=[64]"], [64], [128, 2048]),
    ],
)
def test_lengths_left_open_suit_the_device(overrides: list[str], prompts: list[int], generations: list[int]) -> None:
    task = composed("model=random_tiny", "task=latency", *overrides).settled().task
    assert (task.prompt_lengths, task.generation_lengths) == (prompts, generations)
