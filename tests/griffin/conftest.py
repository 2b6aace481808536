"""Settings that all tests of the library share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engines import uncompiled
from families import WAYS, fresh
from transformers import PreTrainedModel

import griffin


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts learn after four tokens: the tests' texts have few more."""
    monkeypatch.setattr(griffin.draft, "LEARN_EVERY", 4)


@pytest.fixture(params=griffin.MODES)
def mode(request: pytest.FixtureRequest) -> str:
    """Of computing with experts."""
    return str(request.param)


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def way(request: pytest.FixtureRequest) -> Any:
    """Options of `griffin.prune`: how experts are put to work."""
    return request.param


@pytest.fixture(params=[None, uncompiled])
def compiler(request: pytest.FixtureRequest) -> Any:
    """Of engines: none, or what has them decode as they do where they compile."""
    return request.param


@pytest.fixture
def no_gradients() -> Iterator[None]:
    """For tests that call models by hand."""
    with torch.no_grad():
        yield


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refreshes after 2, 4, 8, .. tokens, and a small vocabulary of drafts."""
    monkeypatch.setattr(griffin.refresh, "_FIRST", 2)
    for module in (griffin.draft_vocabulary, griffin.draft):
        monkeypatch.setattr(module, "BEST", 3)


@pytest.fixture(scope="session")
def half_idle() -> PreTrainedModel:
    """A model in which half of the neurons write nothing, so that Wanda's experts at 50% are the whole model."""
    model = fresh("llama")
    with torch.no_grad():
        for block in griffin.find_feedforward_blocks(model):
            block.output.weight[:, ::2] = 0.0
    return model
