"""A Hydra callback that ends a call of `python -m pipelines.run` with a report of all runs in its output folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from analysis.report import make_report, summary, write_report
from pipelines.errors import UserError


class WriteReport(Callback):
    """Writes `<output_dir>/report` when the jobs are done; `hydra.callbacks.report._target_` names this class.

    A report that cannot be written costs one line, not the runs.
    """

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        """After a single job."""
        self._write(config)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """After a sweep."""
        self._write(config)

    def _write(self, config: DictConfig) -> None:
        output_dir = Path(config.output_dir)
        try:
            report = make_report(str(output_dir))
            print(f"\n{summary(report, write_report(report, output_dir / 'report'))}")
        except UserError as error:
            print(f"warning: no report: {error}")
