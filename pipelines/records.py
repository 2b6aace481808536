"""What the files of a run hold: samples, their arrays, a record; and how such a file is written.

The folder they lie in is `run_folder`'s. This module knows neither models nor tasks; the analysis reads with it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import os
import platform
import secrets
import subprocess
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.errors import UserError

DRAFTED = "green"  # in terminals, accepted drafts

Sample = dict[str, Any]
Record = dict[str, Any]


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of one sample; None where the file is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def check_costs(folder: str | None) -> dict[int, float]:
    """By their tokens, what checks cost in dense steps, which a run of `task=latency` has measured; empty for None.

    Raises:
        UserError: the folder has no record of that.
    """
    if folder is None:
        return {}
    try:
        metrics = from_json((Path(folder) / "record.json").read_bytes())["metrics"]
    except (OSError, ValueError, KeyError, TypeError):
        metrics = {}
    found = {key.removeprefix("check_cost_"): cost for key, cost in metrics.items() if key.startswith("check_cost_")}
    if not found:
        raise UserError(f"check_costs={folder}: expected the folder of a finished run of task=latency method=exact")
    return {int(width): found[width] for width in sorted(found, key=int)}


def whole_samples(path: Path) -> tuple[list[Sample], int]:
    """The samples of a `samples.jsonl`, with their arrays, up to the first line that is none, or one that was there
    before; and the bytes that they take there."""
    samples: dict[Any, Sample] = {}
    whole = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            sample = from_json(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(sample, dict) or not isinstance(sample.get("index"), int):
            break
        if "arrays" in sample:
            sample["arrays"] = read_arrays(path.parent / sample["arrays"])
        if sample["index"] in samples or sample.get("arrays", {}) is None:
            break
        samples[sample["index"]] = sample
        whole += len(line)
    return list(samples.values()), whole


def append_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Append samples to a `samples.jsonl`, on disk; a sample's `arrays` go into a file of their own, first."""
    lines = []
    for sample in samples:
        if "arrays" in sample:
            name = f"arrays/{sample['index']}.npz"
            (path.parent / "arrays").mkdir(exist_ok=True)
            np.savez_compressed(content := io.BytesIO(), **sample["arrays"])
            write_in_one_step(path.parent / name, content.getvalue())
            sample = sample | {"arrays": name}
        lines.append(to_json(sample) + "\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(lines))
        file.flush()
        os.fsync(file.fileno())


def pieces(text: str, drafted_spans: Sequence[Sequence[int]]) -> list[tuple[str, bool]]:
    """A text in pieces, and whether each is accepted drafts, by the `drafted_spans` of its sample."""
    places, found = [place for span in drafted_spans for place in span], []
    for number, (begin, end) in enumerate(itertools.pairwise([0, *places, len(text)])):
        found += [(text[begin:end], number % 2 == 1)] * (begin < min(end, len(text)))
    return found


def to_json(value: Any, **options: Any) -> str:
    """JSON that every strict reader takes. NaN and infinity, for which JSON has no number, are `{"float": "nan"}`,
    `{"float": "inf"}` and `{"float": "-inf"}`; `from_json` makes numbers of them again."""
    return json.dumps(_strict(value), ensure_ascii=False, allow_nan=False, **options)


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return {"float": str(value)} if isinstance(value, float) and not math.isfinite(value) else value


def from_json(text: str | bytes) -> Any:
    """What `to_json` wrote; ValueError where the text is not JSON, or not UTF-8."""
    return json.loads(text, object_hook=lambda found: float(found["float"]) if found.keys() == {"float"} else found)


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no file, or it holds anything else."""
    try:
        value = from_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error (0 for a single value); of values that are not all finite, neither is."""
    if not values:
        raise ValueError("no values to average")
    mean = sum(values) / len(values)  # summed as lm-eval does: the same last digit
    squares = sum((value - mean) * (value - mean) for value in values)
    return mean, math.sqrt(squares / max(len(values) - 1, 1) / len(values))


def environment(device: str) -> dict[str, Any]:
    """What ran: versions and the kind of machine, and nothing that names a site or a person."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": device,
        **code_versions(),
    }


def code_versions() -> dict[str, Any]:
    """The commit and the versions of the code that runs."""
    from griffin import __version__  # takes torch along, which readers of records do without

    return {
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
    return {"metrics": _digest(to_json(metrics, sort_keys=True).encode()), "samples": _digest(samples.read_bytes())}


def _digest(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def contradiction(record: Record, folder: Path) -> str | None:
    """How a finished run's files contradict each other, as a sentence; None if they do not."""
    written = record.get("digests")
    if not isinstance(written, dict):
        return "record.json is of an unknown version: it has no digests"
    try:
        digest = digests(record.get("metrics") or {}, folder / "samples.jsonl")
    except FileNotFoundError:
        return "samples.jsonl is missing"
    except OSError as error:
        return f"samples.jsonl cannot be read ({error})"
    if digest["samples"] != written.get("samples"):
        return "samples.jsonl is not what record.json was made from"
    return None if digest == written else "the metrics in record.json are not those that were written"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system says of writing here, or of locks that there are none, as a UserError."""
    try:
        yield
    except OSError as error:
        no_locks = error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
        reason = "its file system has no file locks (flock)" if no_locks else error.strerror
        raise UserError(f"output_dir: cannot write {path}: {reason}") from error


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
