"""What all tests of the pipeline share: a process that looks fresh, and a call of its entry."""

import logging
import sys
from collections.abc import Iterator

import calling
import pytest
from absl import logging as absl_logging
from calling import Entry, Outcome

from pipelines import evaluation

# rouge-score's logger keeps the stderr it was imported with, and closes it when Hydra sets up logging anew: that
# would be pytest's own.
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The pipeline keeps the model for as long as a process lives; every test is a new one."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # the entry sets it: this takes it back after the test
    evaluation._kept.clear()
    yield
    # Hydra's handlers write to the streams of this test, which are closed after it.
    for handler in [each for each in logging.root.handlers if type(each) is logging.StreamHandler]:
        logging.root.removeHandler(handler)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Entry:
    """The entry, called in this process with overrides."""

    def entry(*overrides: str) -> Outcome:
        return calling.main(overrides, monkeypatch, capfd)

    return entry
