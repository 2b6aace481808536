"""How the tests call the pipeline and read what a call leaves behind."""

import copy
import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

import griffin
from pipelines import composition, run
from pipelines.config import RunConfig
from pipelines.config_keys import typed
from pipelines.job import attempt
from pipelines.models import load

REPOSITORY = Path(run.__file__).resolve().parents[1]

# Byte tokens make texts long, so the tests bring short articles. References of single letters meet sampled bytes
# often enough that ROUGE is not simply 0.
ALPHABET = "a b c d e f g h i j k l m n o p q r s t u v w x y z"
ARTICLES = [
    "The ferry was late again on Monday.",
    "A bakery in the old town now sells bread by weight, and its neighbours follow.",
    "Two otters were seen in the harbour.",
    "The museum closes its east wing for a year while the roof, which leaks in winter, is made anew.",
    "Snow fell on the pass in June.",
    "The council votes on a second bridge, after forty years of talk about it.",
]
TEXT = "The tide comes in twice a day, and the harbour fills slowly. " * 30


@dataclass(frozen=True)
class Outcome:
    """How a call ended."""

    code: int
    out: str
    err: str

    def lines(self, start: str) -> list[str]:
        """The lines on stderr that begin with `start`."""
        return [line for line in self.err.splitlines() if line.startswith(start)]

    def refused(self, *named: str) -> str:
        """The one error, which names all these: a line that a person can read, and no traceback."""
        assert self.code == 1
        assert "Traceback" not in self.err + self.out
        (error,) = self.lines("error: ")
        assert [word for word in named if word not in error] == []
        assert len(error) < 1000
        return error


Entry = Callable[..., Outcome]  # with overrides, by the fixture `call`


def main(overrides: Sequence[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Outcome:
    """Call the entry in this process, as `python -m pipelines.run OVERRIDES`."""
    capfd.readouterr()
    message, code = "", 0
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["run.py", *overrides])
        try:
            run.main()
        except SystemExit as end:  # what the interpreter does with it at the end of a process
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            message = f"{end.code}\n" if isinstance(end.code, str) else ""
    captured = capfd.readouterr()
    return Outcome(code, captured.out, captured.err + message)


def command(*overrides: str) -> list[str]:
    """The entry as a command of its own."""
    return [sys.executable, "-m", "pipelines.run", *overrides]


def environment(**variables: str) -> dict[str, str]:
    """The environment of a process of its own, which finds the package from any folder and nobody's settings."""
    plain = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "WANDB_", "HYDRA_")) and not name.lower().endswith("_proxy")
    }
    return plain | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | variables


def process(arguments: Sequence[str], cwd: Path, timeout: float = 120, **variables: str) -> Outcome:
    """Run a command to its end."""
    done = subprocess.run(
        arguments, cwd=cwd, env=environment(**variables), timeout=timeout, capture_output=True, text=True, check=False
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    """A JSON Lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny(output_dir: Path, *more: str, task: str = "generation", rows: int = 3, tokens: int = 8) -> list[str]:
    """A run of a second of whichever task: a random model, `rows` short rows, no shots, no tracking; later overrides
    win. Generation and fidelity are over the articles."""
    folder = output_dir.parent
    folder.mkdir(parents=True, exist_ok=True)
    plain = {"model": "random_tiny"}
    lengths = {"task.prompt_lengths": "[12]", "task.generation_lengths": "[9]"}
    if task in ("generation", "fidelity"):
        articles = itertools.islice(itertools.cycle(ARTICLES), max(rows, len(ARTICLES)))
        data = write_rows(folder / "articles.jsonl", [{"article": text, "summary": ALPHABET} for text in articles])
        plain |= {"task.data_files": str(data), "task.shots": "0", "task.max_new_tokens": str(tokens)}
        plain |= {"task.kind": task} if task == "fidelity" else {}
    elif task in ("perplexity", "flocking"):
        (folder / "text.txt").write_text(TEXT)
        short = lengths if task == "perplexity" else {"task.sequence_length": "16", "task.max_new_tokens": "3"}
        plain |= {"task": task, "task.data_files": str(folder / "text.txt")} | short
    else:
        plain |= {"task": task} | (lengths | {"task.repeats": "2"} if task == "latency" else {})
    plain |= {} if task == "latency" else {"limit": str(rows)}
    plain |= {"output_dir": str(output_dir), "wandb.mode": "disabled"}
    plain |= dict(override.split("=", 1) for override in more)
    return [f"{key}={value}" for key, value in plain.items()]


def run_folders(output_dir: Path) -> list[Path]:
    """The run folders, by name."""
    return sorted(path for path in output_dir.iterdir() if path.is_dir() and not path.name.startswith("."))


def run_folder(output_dir: Path) -> Path:
    """The one run folder."""
    (folder,) = run_folders(output_dir)
    return folder


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a run."""
    record: dict[str, Any] = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    return record


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The samples of a run, in the data's order; batches write theirs by length."""
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").split("\n")  # texts may hold other line ends
    assert lines.pop() == "", "the last line is not whole"
    return sorted((json.loads(line) for line in lines), key=lambda sample: sample["index"])


def texts(folder: Path) -> list[str]:
    """The generated texts of a run, in the data's order."""
    return [sample["text"] for sample in read_samples(folder)]


def unchecked(*overrides: str) -> DictConfig:
    """What a call composes to, before it is checked. Choices of groups are composed once: Hydra takes long."""
    groups = tuple(one for one in overrides if (composition.CONF / one.partition("=")[0]).is_dir())
    config = copy.deepcopy(_composed(groups))
    for override in OverridesParser.create().parse_overrides([one for one in overrides if one not in groups]):
        OmegaConf.update(config, override.key_or_group, override.value(), force_add=override.is_add())
    return config


def by_hydra(overrides: Sequence[str], **options: bool) -> DictConfig:
    """What Hydra composes."""
    composition.register()
    with hydra.initialize_config_dir(str(composition.CONF), version_base="1.3"):
        return hydra.compose("config", overrides=list(overrides), **options)


_composed = functools.cache(by_hydra)


def composed(*overrides: str) -> RunConfig:
    """The checked configuration of a call."""
    return typed(unchecked(*overrides))


def ran(*overrides: str) -> list[Path]:
    """The run folders of a call, dense first: all that the entry does but composing, which is most of its time."""
    found = attempt(composed(*overrides), composition.Call(overrides, None, single=True))
    assert [one.reason for one in found if one.reason] == []
    return [one.folder for one in found if one.folder]


def timeless(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All that a run's record and samples say, to the bit, but for where, when and by which call it ran."""
    record = read_record(folder)
    record["digests"]["samples"] = None  # of seconds, too
    record["environment"]["started"] = record["environment"]["finished"] = None
    record["config"]["output_dir"] = record["environment"]["command"] = record["timing"] = None
    record["config"]["task"].pop("data_files", None)  # the digest of their content is in the environment
    samples = [sample | {"seconds": None} for sample in read_samples(folder)]
    for sample in samples:
        if "drafting" in sample:
            sample["drafting"]["seconds"] = None
    return record, samples


def cut_off(folder: Path, *kept: int) -> None:
    """Leave a run as if it had ended before its record, with so many samples as they were written, or all."""
    (folder / "record.json").unlink(missing_ok=True)
    lines = (folder / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "samples.jsonl").write_bytes(b"".join(lines[: kept[0]] if kept else lines))


def saved_model(folder: Path) -> Path:
    """The files of the model random_tiny."""
    loaded = load(composed("model=random_tiny").model, "cpu", 0)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def prompts_run(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """A list that grows by the lengths of the prompts of every dense pass over prompts."""
    lengths: list[list[int]] = []
    prefill = griffin.prefill

    def counted(engine: griffin.Engine, prompts: Sequence[Any], *arguments: Any, **options: Any) -> Any:
        lengths.append([len(ids) for ids in prompts])
        return prefill(engine, prompts, *arguments, **options)

    monkeypatch.setattr(griffin, "prefill", counted)
    return lengths
