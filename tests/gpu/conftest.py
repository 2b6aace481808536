"""Tests that need a GPU. torch, transformers and pytest are all that they import, so that a bare machine can run them:

    make test-gpu

Without a GPU they are skipped, but for those of the benchmark. `GRIFFIN_TEST_DEVICE=cpu` runs those there whose content
a CPU allows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch

DEVICE = os.environ.get("GRIFFIN_TEST_DEVICE", "cuda" if torch.cuda.is_available() else "none")


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the reason."""
    for item in items:
        if DEVICE == "none" and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU; GRIFFIN_TEST_DEVICE=cpu runs what a CPU allows"))
        elif item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where models run."""
    return torch.device(DEVICE)
