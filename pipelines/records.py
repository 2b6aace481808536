"""What the files of a run hold: samples, their arrays, a record; and how such a file is written.

The folder they lie in is `run_folder`'s. This module knows neither models nor tasks; the analysis reads with it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import secrets
import statistics
import subprocess
import zipfile
import zlib
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

Sample = dict[str, Any]
Record = dict[str, Any]


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of one sample; None where the file is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error (0 for a single value).

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values to average")
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return sum(values) / len(values), spread  # summed as lm-eval does: the same last digit


def environment(device: str) -> dict[str, Any]:
    """What ran: versions and the kind of machine, and nothing that names a site or a person."""
    from griffin import __version__  # takes torch along, which readers of records do without

    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": device,
        **_source(),
        "griffin-pruning": __version__,  # what runs; an editable installation may name an earlier one
        **{package: _version(package) for package in ("torch", "transformers", "rouge-score")},
    }


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _processor() -> str:
    """What the processor calls itself; the architecture where it does not."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def _source() -> dict[str, Any]:
    """The commit that this code is of, and whether it was changed since; None where it is no git checkout."""
    git = ["git", "-C", str(Path(__file__).resolve().parents[1])]
    try:
        found = [
            subprocess.run([*git, *words], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain"), ("ls-files", "pipelines/records.py"))
        ]
    except (OSError, subprocess.SubprocessError):
        found = []
    if not found or not found[2]:  # installed below somebody else's checkout, perhaps
        return {"git_commit": None, "git_clean": None}
    return {"git_commit": found[0], "git_clean": not found[1]}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# -- whether a record and its samples belong together ------------------------------------------------------------------


def digests(metrics: dict[str, float], samples: Path) -> dict[str, str]:
    """What a record says of its own metrics and of `samples.jsonl`, so that a change of either is found."""
    return {"metrics": _digest(json.dumps(metrics, sort_keys=True).encode()), "samples": _digest(samples.read_bytes())}


def _digest(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def contradiction(record: Record, folder: Path) -> str | None:
    """How a finished run's files contradict each other, as a sentence; None if they do not.

    Records of older versions have no digests; there the number of samples and the means of their scores are compared.

    Args:
        record: of the run.
        folder: that it lies in.
    """
    path, metrics = folder / "samples.jsonl", record.get("metrics") or {}
    if not path.is_file():
        return "samples.jsonl is missing"
    try:
        reason = _miscounted(metrics, path.read_text(encoding="utf-8"))
        if reason or "digests" not in record:
            return reason
        found = digests(metrics, path)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"samples.jsonl cannot be read ({error})"
    differing = [name for name, digest in found.items() if record["digests"].get(name) != digest]
    if "samples" in differing:
        return "samples.jsonl is not what record.json was made from"
    return "the metrics in record.json are not those that were written" if differing else None


def _miscounted(metrics: dict[str, float], lines: str) -> str | None:
    samples = []
    for line in lines.split("\n"):
        if line:
            sample = json.loads(line)
            samples.append(sample | (sample.get("metrics") or {}))
    samples = [sample for sample in samples if "skipped" not in sample]
    if "samples" in metrics and metrics["samples"] != len(samples):
        return f"record.json counts {metrics['samples']} samples, samples.jsonl holds {len(samples)}"
    for name in metrics:
        values = [sample[name] for sample in samples if isinstance(sample.get(name), int | float)]
        if f"{name}_stderr" in metrics and values and len(values) == len(samples):
            mean = sum(values) / len(values)
            if not math.isclose(mean, metrics[name], rel_tol=1e-6, abs_tol=1e-9):
                return f"record.json says {name}={metrics[name]:g}, the mean of samples.jsonl is {mean:g}"
    return None


def write_in_one_step(path: Path, content: str | bytes) -> None:
    """Replace the file's content, so that whoever reads it meets the old or the new one, and never half of it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # process numbers are alike between nodes
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
