"""Records say everything but who and where; means and standard errors are the textbooks'."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from calling import ran, read_record, tiny

from analysis.run_folders import read_run_folders
from pipelines.records import mean_and_stderr
from pipelines.summary import summary_table
from pipelines.sweeps import progress


def test_a_record_is_flat_finite_numbers_and_says_what_ran(tmp_path: Path) -> None:
    (folder,) = ran(*tiny(tmp_path / "out"))
    record = read_record(folder)
    for values in (record["metrics"], record["timing"]):
        assert values
        assert all(type(value) in (int, float) and math.isfinite(value) for value in values.values())
    assert {"rouge1", "rouge2", "rougeL", "samples", "skipped_prompts"} < set(record["metrics"])
    environment = record["environment"]
    assert {"python", "torch", "transformers", "rouge-score", "griffin-pruning", "device"} < set(environment)
    assert [name for name in ("torch", "transformers", "rouge-score") if not environment[name]] == []


def test_nothing_names_the_machine_or_the_user_or_their_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {"HF_TOKEN": "hf_secret7261", "WANDB_API_KEY": "7261" * 10}
    people = dict.fromkeys(("USER", "LOGNAME", "USERNAME", "LNAME"), "person7261")
    for name, value in (secrets | people).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("platform.node", lambda: "machine7261")
    monkeypatch.setattr("socket.gethostname", lambda: "machine7261")
    (folder,) = ran(*tiny(tmp_path / "out"))
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 3
    for word in (*secrets.values(), "person7261", "machine7261"):
        assert [path.name for path in files if word.encode() in path.read_bytes()] == []


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.0, 0.0, 3.0], [17.25, 3.5, 9.0, 41.125, 0.0]])
def test_mean_and_standard_error_are_the_textbooks(values: list[float]) -> None:
    mean, stderr = mean_and_stderr(values)
    assert mean == pytest.approx(np.mean(values))
    assert stderr == pytest.approx(np.std(values, ddof=1) / np.sqrt(len(values)))
    assert stderr == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)))


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_no_finite_number_is_a_result(broken: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The tide comes in twice a day. " * 20)
    options = ["model=random_tiny", "task=perplexity", "task.prompt_lengths=[12]", "task.generation_lengths=[5]"]
    options += [f"task.data_files={text}", "limit=2", f"output_dir={tmp_path / 'out'}", "wandb.mode=disabled"]
    monkeypatch.setattr("torch.nn.functional.cross_entropy", lambda *_, **__: torch.tensor([1.0, broken]))
    (folder,) = ran(*options)
    for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        assert json.loads(line, parse_constant=pytest.fail)["nll"] == {"p12_g5": {"float": str(broken)}}
    json.loads((folder / "record.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    (record,) = read_run_folders([tmp_path / "out"]).records
    assert str(record["metrics"]["perplexity"]) == str(broken)
    assert math.isnan(record["metrics"]["perplexity_stderr"])
    assert f"{broken:.2f}" in str(summary_table([("dense", record)]))
    (row,) = progress.read(tmp_path / "out")
    assert row.state == progress.DONE


def test_one_value_has_no_error_and_no_values_have_no_mean() -> None:
    assert mean_and_stderr([3.0]) == (3.0, 0.0)
    with pytest.raises(ValueError, match="no values"):
        mean_and_stderr([])
