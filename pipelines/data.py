"""Evaluation data as plain rows: from a JSON Lines file, the project's own files, or the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.hub import prepare_hub, what_to_do
from pipelines.task_config import CodeTask, GenerationTask, HubDataset, PerplexityTask

EMBEDDED = Path(__file__).parent / "data"

Row = dict[str, Any]


def read_rows(
    task: GenerationTask | CodeTask, needed: tuple[str, ...], limit: int | None, offset: int = 0
) -> list[Row]:
    """The rows to evaluate, in the data's order: `limit` (None: all) after the first `offset`.

    Args:
        task: where the data is.
        needed: fields that hold text in every row.
        limit: how many rows.
        offset: how many come before them.

    Raises:
        UserError: the data is missing, malformed or unreachable.
    """
    stop = None if limit is None else offset + limit
    if task.data_files is not None:
        rows = read_jsonl(Path(task.data_files), needed, "task.data_files", stop)
    elif task.embedded is not None:
        rows = read_jsonl(EMBEDDED / task.embedded, needed, "task.embedded", stop)
    else:
        assert task.hub is not None
        rows = _read_hub(task.hub, task.hub.split, needed, stop)
    if offset >= len(rows):
        raise UserError(f"offset={offset}: expected less than {len(rows)}, the rows there are")
    return rows[offset:]


def read_shots(task: GenerationTask) -> list[Row]:
    """The first `task.shots` rows of the shots' own source.

    Raises:
        UserError: as `read_rows`, or there are fewer rows than shots.
    """
    if task.shots == 0:
        return []
    needed = (task.article_field, task.summary_field)
    if task.shots_file is not None:
        rows = read_jsonl(Path(task.shots_file), needed, "task.shots_file", task.shots)
    elif task.embedded_shots is not None:
        rows = read_jsonl(EMBEDDED / task.embedded_shots, needed, "task.embedded_shots", task.shots)
    else:
        assert task.hub is not None
        rows = _read_hub(task.hub, task.hub.shots_split, needed, task.shots)
    if len(rows) < task.shots:
        raise UserError(f"task.shots={task.shots}: expected at most {len(rows)}, the rows there are to show")
    return rows


def read_text(task: PerplexityTask) -> str:
    """The task's text: a file as it is, or the rows of the data set joined.

    Raises:
        UserError: the data is missing, malformed or unreachable.
    """
    needed = (task.text_field,)
    if task.data_files is not None and Path(task.data_files).suffix in (".jsonl", ".json"):
        rows = read_jsonl(Path(task.data_files), needed, "task.data_files", None)
    elif task.data_files is not None:
        return read_text_file(task.data_files)
    elif task.embedded is not None:
        rows = read_jsonl(EMBEDDED / task.embedded, needed, "task.embedded", None)
    else:
        assert task.hub is not None
        rows = _read_hub(task.hub, task.hub.split, needed, None)
    return task.separator.join(row[task.text_field] for row in rows)


def read_text_file(path: str) -> str:
    """The text of `task.data_files`.

    Raises:
        UserError: the file cannot be read as UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"task.data_files={path}: cannot be read as UTF-8 text ({error})") from error


def read_jsonl(path: Path, needed: tuple[str, ...], key: str, limit: int | None) -> list[Row]:
    """The rows of a JSON Lines file, each an object with text in the `needed` fields; blank lines are passed over.

    Raises:
        UserError: names `key`, the file and the line.
    """
    rows: list[Row] = []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if limit is not None and len(rows) == limit:
                    break
                if line.strip():
                    rows.append(_parse_row(line, needed, f"{key}={path}: line {number}"))
    except OSError as error:
        raise UserError(f"{key}={path}: {error.strerror}") from error
    if not rows:
        raise UserError(f"{key}={path}: expected JSON Lines, found no row")
    return rows


def digest(path: Path) -> str:
    """Names a file by what is in it, so that a run is the same run wherever its data lies."""
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _parse_row(line: bytes, needed: tuple[str, ...], where: str) -> Row:
    try:
        row = json.loads(line.decode("utf-8-sig"))  # a byte order mark begins files of some editors
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where} is {type(row).__name__}, expected an object")
    for name in needed:
        if not isinstance(row.get(name), str):
            found = "missing" if name not in row else f"{type(row[name]).__name__}, expected text"
            raise UserError(f"{where}: field {name!r} is {found} (fields: {', '.join(row)})")
    for name, value in row.items():
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise UserError(f"{where}: field {name!r} holds half of a surrogate pair, which is no text")
    return row


def _read_hub(hub: HubDataset, split: str, needed: tuple[str, ...], limit: int | None) -> list[Row]:
    prepare_hub()
    import datasets  # slow to import, needed for hub data only, and reads the hub's state when imported

    try:
        table = datasets.load_dataset(hub.path, hub.name, split=split)
    except Exception as error:  # the hub's failures have no common type
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"task.hub.path={hub.path}: cannot be loaded from the hub ({reason}); {what_to_do()}, or name a local file "
            "with task.data_files=FILE (and task.shots_file=FILE for shots)"
        ) from error
    missing = [name for name in needed if name not in table.column_names]
    if missing:
        raise UserError(f"task.hub.path={hub.path}: no field {missing[0]!r} (fields: {', '.join(table.column_names)})")
    return [dict(row) for row in table.select(range(min(limit or len(table), len(table))))]
