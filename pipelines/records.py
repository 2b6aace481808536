"""What the files of a run hold: samples, their arrays, a record; and how such a file is written.

The folder they lie in is `run_folder`'s. This module knows neither models nor tasks; the analysis reads with it.
"""

from __future__ import annotations

import math
import os
import platform
import secrets
import statistics
import zipfile
import zlib
from collections.abc import Sequence
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
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "device": device,
        **{package: _version(package) for package in ("griffin-pruning", "torch", "transformers", "rouge-score")},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
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
