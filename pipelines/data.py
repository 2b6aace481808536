"""Evaluation data as plain rows: from a JSON Lines file, the project's own files, or the Hugging Face hub.

What reads raises UserError where the data is missing, malformed or unreachable.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from pipelines.errors import UserError, first_line
from pipelines.hub import NEVER_LOADED, commit_of, prepare_hub, what_to_do
from pipelines.task_config import GenerationTask, HubDataset, PerplexityTask

EMBEDDED = Path(__file__).parent / "data"

Row = dict[str, Any]

# Of each data set that this process read from the hub, the commit.
revisions: dict[str, str | None] = {}


def read_rows(task: Any, needed: tuple[str, ...], limit: int | None, offset: int) -> list[tuple[int, str, Row]]:
    """The rows to evaluate, with text in `needed` fields, in the data's order: `limit` of them after `offset`; each
    with its index and the name that it has in the data."""
    rows = _rows(task, _DATA, needed, None if limit is None else offset + limit)
    if offset >= len(rows):
        raise UserError(f"offset={offset}: expected less than {len(rows)}, the rows there are")
    return [(index, str(row.get("id", index)), row) for index, row in enumerate(rows[offset:], start=offset)]


def read_shots(task: GenerationTask) -> list[Row]:
    """The first `task.shots` rows of the shots' own source; UserError where it has fewer."""
    if task.shots == 0:
        return []
    rows = _rows(task, _SHOTS, (task.article_field, task.summary_field), task.shots)
    if len(rows) < task.shots:
        raise UserError(f"task.shots={task.shots}: expected at most {len(rows)}, the rows there are to show")
    return rows


def read_text(task: PerplexityTask) -> str:
    """The task's text: a file as it is, or the rows of the data set joined."""
    if task.data_files is not None and Path(task.data_files).suffix not in (".jsonl", ".json"):
        return read_text_file(task.data_files)
    rows = _rows(task, _DATA, (task.text_field,), None)
    return task.separator.join(row[task.text_field] for row in rows)


# The keys of a task that name a file and one of our own files, and the key of its hub data that names a split.
_DATA = ("data_files", "embedded", "split")
_SHOTS = ("shots_file", "embedded_shots", "shots_split")


def _rows(task: Any, keys: tuple[str, str, str], needed: tuple[str, ...], limit: int | None) -> list[Row]:
    """The first rows of a task's file, else of the one of ours that it names, else of its data on the hub."""
    for key, folder in zip(keys, (Path(), EMBEDDED), strict=False):
        if (name := getattr(task, key)) is not None:
            return read_jsonl(folder / name, needed, f"task.{key}", limit)
    return _read_hub(task.hub, getattr(task.hub, keys[2]), needed, limit)


def read_text_file(path: str) -> str:
    """The text of `task.data_files`; UserError where it cannot be read as UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"task.data_files={path}: cannot be read as UTF-8 text ({error})") from error


def read_jsonl(path: Path, needed: tuple[str, ...], key: str, limit: int | None) -> list[Row]:
    """The rows of a JSON Lines file, objects with text in `needed` fields; a UserError names `key`, file and line."""
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


def data_revision(task: Any) -> str | None:
    """The commit of the hub's data set that the task read; None where it read none."""
    hub = getattr(task, "hub", None)
    return revisions.get(hub.path) if hub is not None and task.data_files is None else None


def digest(path: Path) -> str:
    """Names a file by what is in it, so that a run is the same run wherever its data lies."""
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def folder_digest(folder: Path) -> str:
    """Names a model's folder by the names and contents of the files that loading may read there.

    The files are read whole, side by side, once in a process, at about two gigabytes a second where the disk gives
    them; loading then finds them in memory.
    """
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    files = [path for path in files if not any(fnmatch(path.name, pattern) for pattern in NEVER_LOADED)]
    with ThreadPoolExecutor() as pool:
        contents = pool.map(lambda path: _content(path.resolve(), path.stat().st_size, path.stat().st_mtime_ns), files)
        lines = [f"{path.name} {content}\n" for path, content in zip(files, contents, strict=True)]
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


@cache
def _content(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        raise UserError(
            f"task.hub.path={hub.path}: cannot be loaded from the hub ({first_line(error)}); {what_to_do()}, or name a "
            "local file with task.data_files=FILE (and task.shots_file=FILE for shots)"
        ) from error
    revisions[hub.path] = commit_of(table.cache_files[0]["filename"] if table.cache_files else None)
    missing = [name for name in needed if name not in table.column_names]
    if missing:
        raise UserError(f"task.hub.path={hub.path}: no field {missing[0]!r} (fields: {', '.join(table.column_names)})")
    return [dict(row) for row in table.select(range(min(limit or len(table), len(table))))]
