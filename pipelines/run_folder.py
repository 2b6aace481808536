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
import errno
import hashlib
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from pipelines.errors import UserError
from pipelines.records import Record, Sample, contradiction, digests, environment, now, read_arrays, write_in_one_step


def run_id(readable: str, identity: dict[str, Any]) -> str:
    """The name of a run: readable words and a hash of all that determines its result.

    Args:
        readable: words for people; what a file name or W&B does not take becomes a dash.
        identity: plain values; equal identities are the same run.
    """
    canonical = json.dumps(identity, sort_keys=True, ensure_ascii=False)
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "-", readable)[:100]
    return f"{safe}-{hashlib.sha256(canonical.encode()).hexdigest()[:10]}"


class RunFolder:
    """One run's folder. Creating the object touches no file.

    Attributes:
        path: `<output_dir>/<run_id>`.
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
        """Become the one process that writes here; False if another one is.

        Args:
            wait_seconds: for the lock; `held` of another process takes it for a moment.

        Raises:
            UserError: the folder cannot be written, or its file system has no locks.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=wait_seconds)
        except Timeout:
            return False
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise UserError(f"output_dir: the file system of {self.path} has no file locks (flock)") from error
            raise _unwritable(self.path, error) from error
        return True

    def release(self) -> None:
        """Let others write here."""
        if self._lock.is_locked:
            # Only where there is a record: whoever locks a file that is gone then finds the run finished.
            if self._record.exists():
                (self.path / ".lock").unlink(missing_ok=True)
            self._lock.release()

    def held(self) -> bool:
        """Whether a process is writing here."""
        if not (self.path / ".lock").exists():
            return False
        probe = FileLock(self.path / ".lock", fallback_to_soft=False)
        try:
            probe.acquire(timeout=0)
        except (Timeout, OSError):
            return True
        probe.release()
        return False

    def record(self) -> Record | None:
        """The record of a finished run; None where there is none, or it is damaged, or contradicted by its samples, so
        that the run is done again."""
        record = self._written()
        return None if record is None or contradiction(record, self.path) else record

    def damage(self) -> str | None:
        """What is wrong with a record that is there, as a sentence; None if nothing is, or there is no record."""
        if not self._record.exists():
            return None
        record = self._written()
        return "record.json cannot be read" if record is None else contradiction(record, self.path)

    def _written(self) -> Record | None:
        try:
            record = json.loads(self._record.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
            return None
        return record if isinstance(record, dict) and record.get("status") == "finished" else None

    def start(self, config: dict[str, Any], total: int | None = None, beside: Sequence[str] = ()) -> None:
        """Create the folder, write its configuration and forget an earlier failure.

        Args:
            config: the resolved configuration of this one run.
            total: how many samples the run will be, as far as is known.
            beside: the ids of the runs, this one included, whose rows run in batches with this one's. A run that goes
                on after a cut-off keeps those that it began with.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._forget_changed_samples()
            for left_behind in self.path.glob(".*.tmp"):  # by a process that was killed
                left_behind.unlink()
            write_in_one_step(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
            before = self.state() if self._samples.exists() else {"beside": [], "started": None}
            state = {"samples": total, "failed": None, "beside": before["beside"] or list(beside)}
            state["started"] = before["started"] or now()
            write_in_one_step(self._state, json.dumps(state) + "\n")
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def _forget_changed_samples(self) -> None:
        """Where the samples of a finished run have been changed since, nobody knows which: none is used again."""
        record = self._written()
        known = None if record is None else record.get("digests")
        if known and self._samples.exists() and digests({}, self._samples)["samples"] != known.get("samples"):
            self._samples.unlink()

    def add_tags(self, tags: Sequence[str]) -> list[str]:
        """Add tags to a finished run; returns those that it did not have.

        Raises:
            UserError: the folder cannot be written.
        """
        record = self.record()
        assert record is not None
        new = [tag for tag in dict.fromkeys(tags) if tag not in record["config"].get("tags", [])]
        if new:
            record["config"]["tags"] = [*record["config"].get("tags", []), *new]
            try:
                write_in_one_step(self._record, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
            except OSError as error:
                raise _unwritable(self._record, error) from error
        return new

    def fail(self, reason: str) -> None:
        """Note why the run failed, for people: the next call tries again. On a full disk nothing is noted."""
        with contextlib.suppress(OSError):
            write_in_one_step(self._state, json.dumps(self.state() | {"failed": reason}, ensure_ascii=False) + "\n")

    def state(self) -> dict[str, Any]:
        """Of an unfinished run, as far as known: {samples: how many it will be, failed: why, beside: see `start`,
        started: when}."""
        try:
            state = json.loads(self._state.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError, UnicodeDecodeError):
            state = None
        return {"samples": None, "failed": None, "beside": [], "started": None} | (
            state if isinstance(state, dict) else {}
        )

    def samples(self) -> list[Sample]:
        """The whole samples written so far. What follows the last whole one is cut off the file."""
        samples, whole = self._whole()
        if self._samples.exists() and whole < self._samples.stat().st_size:
            os.truncate(self._samples, whole)
        return samples

    def progress(self) -> tuple[int, float]:
        """The number of whole samples and the seconds they took, without touching the file."""
        samples, _ = self._whole()
        return len(samples), sum(sample.get("seconds", 0.0) for sample in samples)

    def _whole(self) -> tuple[list[Sample], int]:
        """The samples up to the first line that is none, or one that was there before; and their bytes."""
        try:
            data = self._samples.read_bytes()
        except FileNotFoundError:
            return [], 0
        samples: dict[Any, Sample] = {}
        whole = 0
        for line in data.splitlines(keepends=True):
            try:
                sample = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError):
                break
            if not line.endswith(b"\n") or not isinstance(sample, dict) or not isinstance(sample.get("index"), int):
                break
            if sample["index"] in samples:
                break
            if "arrays" in sample:
                arrays = read_arrays(self.path / sample["arrays"])
                if arrays is None:
                    break
                sample["arrays"] = arrays
            samples[sample["index"]] = sample
            whole += len(line)
        return list(samples.values()), whole

    def append(self, samples: Sequence[Sample]) -> None:
        """Append samples, and return once they are on disk; a sample's `arrays` go into a file of their own, first.

        Raises:
            UserError: the file cannot be written, for example because the disk is full.
        """
        try:
            written = [
                sample | {"arrays": self._write_arrays(sample)} if "arrays" in sample else sample for sample in samples
            ]
            lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in written)
            with self._samples.open("a", encoding="utf-8") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _unwritable(self._samples, error) from error

    def _write_arrays(self, sample: Sample) -> str:
        name = f"arrays/{sample['index']}.npz"
        (self.path / "arrays").mkdir(exist_ok=True)
        content = io.BytesIO()
        np.savez_compressed(content, **sample["arrays"])
        write_in_one_step(self.path / name, content.getvalue())
        return name

    def finish(
        self,
        config: dict[str, Any],
        metrics: dict[str, float],
        timing: dict[str, float],
        device: str,
        versions: dict[str, Any] | None = None,
        *,
        method: dict[str, Any] | None = None,
        evaluation: dict[str, Any] | None = None,
    ) -> Record:
        """Write the record, in one step.

        Args:
            config: the resolved configuration of this one run.
            metrics: flat, name -> number.
            timing: flat, name -> seconds.
            device: what the model ran on, in words.
            versions: of what this kind of task ran beside the usual, such as lm-eval.
            method: what the analysis calls the run: words and settings.
            evaluation: what the run must share with another one to be compared with it, flat.

        Raises:
            UserError: the file cannot be written.
        """
        record: Record = {
            "run_id": self.run_id,
            "status": "finished",
            "method": method,
            "evaluation": evaluation,
            "config": config,
            "metrics": metrics,
            "timing": timing,
            "environment": environment(device)
            | {"started": self.state()["started"], "finished": now()}
            | (versions or {}),
        }
        try:
            self._samples.touch()
            record["digests"] = digests(metrics, self._samples)
            write_in_one_step(self._record, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise _unwritable(self._record, error) from error
        self._state.unlink(missing_ok=True)
        return record


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"output_dir: cannot write {path}: {error.strerror}")
