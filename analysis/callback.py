"""A Hydra callback that writes a report of all runs in the output folder when `python -m pipelines.run` ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from analysis.contents import make_report
from analysis.output import write_report
from analysis.report import summary
from analysis.samples import coloured
from pipelines.errors import UserError
from pipelines.summary import CLOSING, OPENING


class WriteReport(Callback):
    """Writes `<output_dir>/report` after the last job. `hydra.callbacks.report._target_` names this class.

    If the report cannot be written, one line says why, and the runs still count as finished.
    """

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra calls this after a single job."""
        output_dir = Path(config.output_dir)
        try:
            report = make_report(str(output_dir))
            index = write_report(report, output_dir / "report")
            OPENING.extend([*report.summary, *coloured(report.answers)])
            CLOSING.append(summary(report, index))
        except UserError as error:
            CLOSING.append(f"warning: no report: {error}")

    on_multirun_end = on_run_end  # after a sweep
