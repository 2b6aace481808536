"""The tests on SLURM share one cluster, and the way of calling the pipeline with its other tests."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cluster
import pytest

sys.path.append(str(Path(__file__).parents[1] / "pipelines"))  # calling.py


@pytest.fixture(scope="session")
def slurm() -> Iterator[dict[str, str]]:
    """The environment variables by which commands find the cluster."""
    reason = cluster.missing()
    if reason:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # not pytest's folders, which munge finds too private
    folder.chmod(0o755)
    try:
        with cluster.cluster(folder / "cluster", cpus=2) as variables:
            yield variables
    finally:
        shutil.rmtree(folder)
