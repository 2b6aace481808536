"""Weights & Biases: a view of the records, never their source. The only module that imports wandb."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.hub import check_reachable
from pipelines.records import Record, Sample, to_json, write_in_one_step, writing


@dataclass(frozen=True)
class Media:
    """What is to be looked at of a run.

    Attributes:
        images: PNG files; their names without the suffix are their keys in W&B.
        tables: name -> rows with the same keys.
    """

    images: list[Path] = field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


class Tracker:
    """One run in W&B. With `wandb.mode=disabled` every method does nothing and wandb is not imported."""

    def __init__(self, run: Any, folder: Path) -> None:
        self._run = run
        self._folder = folder

    def log(self, done: int, values: dict[str, float]) -> None:
        """The metrics so far, over the number of samples done."""
        if self._run is not None:
            self._run.log({"samples_done": done, **values}, step=done)

    def finish(self, record: Record, samples: list[Sample], media: Media) -> None:
        """The record into the summary, samples and media as tables and images; then the run is closed.

        Metrics and timing are keys of their own, for charts. The whole of the record beside them is what the analysis
        reads back: the summary also keeps what was logged on the way.
        """
        own = ("arrays", "prompt")  # a table of W&B has neither room for them, nor perhaps the right to the latter
        rows = [{key: value for key, value in sample.items() if key not in own} for sample in samples]
        self.show(Media(media.images, {"samples": rows, **media.tables}))
        if self._run is not None:
            parts = ("run_id", "method", "evaluation", "metrics", "timing", "environment", "digests")
            whole = to_json({part: record[part] for part in parts})
            with _files_in(self._folder):
                self._run.summary.update(record["metrics"] | record["timing"] | {"record": whole})
            self.close(0)

    def show(self, media: Media) -> None:
        """Images and tables, under `<name>_image` and `<name>_table`: a number may have the name itself."""
        if self._run is None:
            return
        import wandb

        shown: dict[str, Any] = {f"{path.stem}_image": wandb.Image(str(path)) for path in media.images}
        for name, rows in media.tables.items():
            columns: list[Any] = list(dict.fromkeys(key for row in rows for key in row))
            lines = [[row.get(key) for key in columns] for row in rows]  # every column has one type, so nested is text
            cells = [[it if isinstance(it, str | int | float | None) else to_json(it) for it in line] for line in lines]
            shown[f"{name}_table"] = wandb.Table(columns=columns, data=cells)
        with _files_in(self._folder):
            self._run.log(shown)

    def close(self, exit_code: int) -> None:
        """Close the run, unless it is closed."""
        if self._run is not None:
            with _files_in(self._folder):
                self._run.finish(exit_code=exit_code)
            self._run = None


@contextlib.contextmanager
def track(settings: Any, folder: Path, run_id: str, **described: Any) -> Iterator[Tracker]:
    """A run in W&B until its record is there, marked as failed if the context ends with an exception before.

    An unreachable or refusing server costs one warning: the run goes on offline, to be uploaded by `wandb sync`.

    Args:
        settings: `mode`, `project` and `entity`, as the configuration's `wandb` has them.
        folder: the run folder; all of wandb's files stay in it.
        run_id: our run id. W&B's has some letters more, drawn once for the folder: two people, or one with two output
            folders, may log the same run to one project.
        described: `name`, for people; `group`, which the runs of a sweep share; `job_type`, `tags` and `config`.
    """
    if settings.mode == "disabled":
        yield Tracker(None, folder)
        return
    drawn = folder / "wandb" / "id"
    with writing(drawn):
        if not drawn.exists():
            drawn.parent.mkdir(parents=True, exist_ok=True)
            write_in_one_step(drawn, secrets.token_hex(4))
    arguments = described | {
        "project": settings.project,
        "entity": settings.entity,
        "dir": str(folder),
        "id": f"{run_id}-{drawn.read_text(encoding='ascii')}",
        "resume": "allow",
        "reinit": "create_new",  # the methods of a grid are runs side by side
    }
    with _files_in(folder):
        tracker = Tracker(_init(settings, arguments), folder)
    try:
        yield tracker
    except BaseException:
        tracker.close(1)
        raise
    tracker.close(0)


def _init(settings: Any, arguments: dict[str, Any]) -> Any:
    import wandb

    # The machine's name, its user and the command line are nobody's business; timeouts bound a dead server.
    quiet = wandb.Settings(
        silent=True,
        console="off",
        init_timeout=10,
        finish_timeout=60,
        disable_git=True,
        save_code=False,
        x_disable_meta=True,
        x_disable_machine_info=True,
        host="",
    )
    if settings.mode == "offline":
        return wandb.init(mode="offline", settings=quiet, **arguments)
    address = wandb.setup().settings.base_url
    try:
        check_reachable(address)
        return wandb.init(mode="online", settings=quiet, **arguments)
    except (OSError, wandb.Error) as error:
        _warn_offline(address, " ".join(str(error).split()), str(Path(arguments["dir"]).parent))
        return wandb.init(mode="offline", settings=quiet, **arguments)


def check_server() -> None:
    """Raises UserError where the W&B server cannot be reached, without wandb's minutes of attempts."""
    import wandb

    address = wandb.setup().settings.base_url
    try:
        check_reachable(address)
    except OSError as error:
        where = "WANDB_BASE_URL" if os.environ.get("WANDB_BASE_URL") else "wandb's settings"
        raise UserError(f"the W&B server cannot be reached: {address}, from {where} ({error})") from error


@cache
def _warn_offline(address: str, reason: str, output_dir: str) -> None:
    print(
        f"warning: wandb.mode=online: {address} cannot be used ({reason}); tracking goes on offline, upload it "
        f"later with: python -m pipelines.sync {output_dir}",
        file=sys.stderr,
    )


@contextlib.contextmanager
def _files_in(folder: Path) -> Iterator[None]:
    """wandb keeps the bytes of tables in the home folder unless its environment says otherwise."""
    names = ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ARTIFACT_DIR")
    before = {name: os.environ[name] for name in names if name in os.environ}
    os.environ.update(dict.fromkeys(names, str(folder / "wandb")) | {"WANDB_DIR": str(folder)})
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]
        os.environ.update(before)
