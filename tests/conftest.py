"""What tests of the library and of the pipeline share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from transformers.utils import logging

logging.get_logger()  # writes to the stderr of its first call: one that a test captures would be closed after that test


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models run many times faster on one thread than on a pool; on a busy machine the real one does, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Only reference counting frees memory: what is no longer used must go at once."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
