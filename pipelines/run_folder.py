"""Run folders: the source of truth about what was run and what came out.

    <output_dir>/<run_id>/config.yaml     the resolved configuration, written first
                          samples.jsonl   one line per sample, appended as the run goes
                          state.json      until there is a record: how many samples it will be, and why it failed
                          arrays/N.npz    the arrays of sample N, where its kind of task keeps any
                          record.json     written last and in one step: a run with a record is finished
                          .lock           locked by the process that writes here; gone with the record

A run that was cut off anywhere continues after its last whole sample. This module knows neither models nor tasks.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from tqdm import tqdm

from pipelines import records
from pipelines.records import Record, Sample, to_json, write_in_one_step, writing

_NOTHING_KNOWN: dict[str, Any] = {"samples": None, "failed": None, "beside": [], "started": None, "versions": []}


def run_id(readable: str, identity: dict[str, Any]) -> str:
    """The name of a run: readable words, without what a file name or W&B does not take, and a hash of its identity."""
    canonical = json.dumps(identity, sort_keys=True, ensure_ascii=False)
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "-", readable)[:100]
    return f"{safe}-{hashlib.sha256(canonical.encode()).hexdigest()[:10]}"


class RunFolder:
    """One run's folder, `<output_dir>/<run_id>`. Creating the object touches no file.

    What writes here raises UserError where the folder cannot be written.
    """

    def __init__(self, output_dir: Path, run_id: str) -> None:
        self.run_id = run_id
        self.path = output_dir / run_id
        self._samples = self.path / "samples.jsonl"
        self._state = self.path / "state.json"
        self._record = self.path / "record.json"
        # flock: the operating system takes it back from a dead process. A file system without it is refused, because
        # there a dead worker's lock would stay.
        self._lock = FileLock(self.path / ".lock", fallback_to_soft=False, thread_local=False)

    def claim(self, wait_seconds: float = 1.0) -> bool:
        """Become the one process that writes here; False if another one is. `held` takes the lock for a moment only."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=wait_seconds)
            except Timeout:
                return False
        return True

    def release(self) -> None:
        """Let others write here."""
        if self._lock.is_locked:
            # Only where there is a record: whoever locks a file that is gone then finds the run finished.
            if self._record.exists():
                (self.path / ".lock").unlink(missing_ok=True)
            self._lock.release()

    def held(self) -> bool:
        """Whether a process is writing here, of whichever user; a lock that may not even be read counts as held."""
        try:
            with (self.path / ".lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True
        return False

    def record(self) -> Record | None:
        """The record of a finished run; None where there is none, or it is damaged, or contradicted by its samples, so
        that the run is done again."""
        record = self._written()
        return None if record is None or records.contradiction(record, self.path) else record

    def damage(self) -> str | None:
        """What is wrong with a record that is there, as a sentence; None if nothing is, or there is no record."""
        record = self._written()
        if record is None:
            return "record.json cannot be read" if self._record.exists() else None
        return records.contradiction(record, self.path)

    def _written(self) -> Record | None:
        record = records.read_object(self._record)
        return record if record and record.get("status") == "finished" else None

    def start(self, config: dict[str, Any], total: int | None = None, beside: Sequence[str] = ()) -> None:
        """Create the folder, write its configuration and forget an earlier failure.

        Args:
            config: the resolved configuration of this one run, of so many samples in `total`, as far as is known.
            beside: the ids of the runs, this one included, whose rows run in batches with this one's. A run that goes
                on after a cut-off keeps those that it began with.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            known, samples = (self._written() or {}).get("digests"), self._samples
            if known and samples.exists() and records.digests({}, samples)["samples"] != known.get("samples"):
                samples.unlink()  # changed since the run was finished, and nobody knows which of them
            for left_behind in self.path.glob(".*.tmp"):  # by a process that was killed
                left_behind.unlink()
            write_in_one_step(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
            before = self.state() if self._samples.exists() else _NOTHING_KNOWN
            state = before | {"samples": total, "failed": None, "beside": before["beside"] or list(beside)}
            self._note(state | {"started": before["started"] or records.now()})

    def config(self) -> dict[str, Any]:
        """The resolved configuration; empty where it cannot be read."""
        try:
            config: Any = OmegaConf.to_container(OmegaConf.load(self.path / "config.yaml"))
            return config if isinstance(config, dict) else {}
        except Exception:  # of reading, of YAML and of OmegaConf
            return {}

    def add_tags(self, tags: Sequence[str]) -> list[str]:
        """Add tags to a finished run; returns those that it did not have."""
        record = self.record()
        assert record is not None
        new = [tag for tag in dict.fromkeys(tags) if tag not in record["config"].get("tags", [])]
        if new:
            record["config"]["tags"] = [*record["config"].get("tags", []), *new]
            with writing(self._record):
                write_in_one_step(self._record, to_json(record, indent=2) + "\n")
        return new

    def write_by(self, versions: dict[str, Any]) -> None:
        """Note what code, model and data the samples come from, from now on; and say so on stderr where those that are
        there come from others.
        """
        state, record = self.state(), self._written()
        if record and self._samples.exists():  # which is contradicted, and about to be made again from its samples
            state["versions"] = [{key: record["environment"].get(key) for key in versions}]
        if state["versions"] and state["versions"][-1] != versions:
            before = state["versions"][-1]
            changed = [key for key in {**before, **versions} if before.get(key) != versions.get(key)]
            words = ", ".join(f"{key} {versions.get(key)} instead of {before.get(key)}" for key in changed)
            tqdm.write(f"warning: {self.path}: its samples so far were made by another version: {words}", sys.stderr)
        others = [known for known in state["versions"] if known != versions]
        with writing(self._state):
            self._note(state | {"versions": [*others, versions]})

    def fail(self, reason: str) -> None:
        """Note why the run failed, for people: the next call tries again. On a full disk nothing is noted."""
        with contextlib.suppress(OSError):
            self._note(self.state() | {"failed": reason})

    def state(self) -> dict[str, Any]:
        """Of an unfinished run, as far as known: {samples: how many it will be, failed: why, beside: see `start`,
        started: when, versions: see `write_by`, the last one last}."""
        return _NOTHING_KNOWN | (records.read_object(self._state) or {})

    def _note(self, state: dict[str, Any]) -> None:
        write_in_one_step(self._state, to_json(state) + "\n")

    def samples(self) -> list[Sample]:
        """The whole samples written so far. What follows the last whole one is cut off the file."""
        samples, whole = records.whole_samples(self._samples)
        if self._samples.exists() and whole < self._samples.stat().st_size:
            os.truncate(self._samples, whole)
        return samples

    def progress(self) -> tuple[int, float]:
        """The number of whole samples and the seconds they took, without touching the file."""
        samples, _ = records.whole_samples(self._samples)
        return len(samples), sum(sample.get("seconds", 0.0) for sample in samples)

    def append(self, samples: Sequence[Sample]) -> None:
        """Append samples, and return once they are on disk; their arrays go into files of their own, first."""
        with writing(self._samples):
            records.append_samples(self._samples, samples)

    def finish(self, device: str, versions: dict[str, Any] | None = None, **parts: Any) -> Record:
        """Write the record, in one step.

        Args:
            device: what the model ran on, in words.
            versions: of what this kind of task ran beside the usual, such as lm-eval.
            parts: `config`, resolved, of this one run; flat `metrics`, and `timing` in seconds; `method`, what the
                analysis calls the run, in words and settings; `evaluation`, what the run must share with another one to
                be compared with it, flat.
        """
        state = self.state()
        record: Record = {"run_id": self.run_id, "status": "finished", "method": None, "evaluation": None}
        record |= {"config": {}, "metrics": {}, "timing": {}} | parts
        record["environment"] = (
            records.environment(device)
            | {"started": state["started"], "finished": records.now()}
            | ({"earlier_versions": state["versions"][:-1]} if state["versions"][1:] else {})
            | (versions or {})
        )
        with writing(self._record):
            self._samples.touch()
            record["digests"] = records.digests(record["metrics"], self._samples)
            write_in_one_step(self._record, to_json(record, indent=2) + "\n")
        self._state.unlink(missing_ok=True)
        return record
