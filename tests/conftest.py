"""What tests of the library and of the pipeline share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from transformers.utils import logging

logging.get_logger()  # writes to the stderr of its first call: one that a test captures would be closed after that test


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Only reference counting frees memory: what is no longer used must go at once."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
