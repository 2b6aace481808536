"""`python -m pipelines.docs_tables`: writes the tables of keys, tasks, methods, statistics and models in docs/tasks.md.

They are made from the configuration's fields and `conf/`, between `<!-- table: NAME -->` and `<!-- end -->`. With
`--check` nothing is written, and a stale table is told with exit code 1.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from griffin import METHODS, STATISTICS, TOKEN_STATISTICS
from pipelines.config_keys import CONF, GROUPS, shown_keys
from pipelines.task_config import TASKS
from pipelines.tasks import KINDS

PAGE = CONF.parent / "docs" / "tasks.md"
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

Rows = Iterator[Sequence[str]]


def _comment(path: Path) -> str:
    """What a file of `conf/` says of itself: the comments at its head."""
    lines = [line.removeprefix("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    return " ".join(line for line in lines if not line.startswith("@package"))


def _files(group: str) -> list[Path]:
    return sorted((CONF / group).glob("*.yaml"))


def _kind(task: Path) -> str:
    """The kind of a task: its own, or that of what it extends."""
    content: Any = OmegaConf.load(task)
    if "kind" in content:
        return str(content.kind)
    extended = str(content.defaults[0])
    kinds: dict[str, Any] = {**TASKS}
    schema = re.fullmatch(r"/schema/(\w+)@_here_", extended)
    return str(kinds[schema[1]].kind) if schema else _kind(task.with_name(f"{extended}.yaml"))


def keys() -> Rows:
    """Every key of a run but those of the task and the model, which `--help` has too."""
    yield from ([f"`{name}`", "", text] for name, text in GROUPS.items())
    yield from ([f"`{key}`", f"`{default}`" if default else "", text] for key, text, default in shown_keys())


def tasks() -> Rows:
    """Every task."""
    for path in _files("task"):
        kind = KINDS[_kind(path)]
        headline = f"`{kind.metric}`" if kind.metric else "the task's own"
        yield f"`{path.stem}`", kind.title.lower(), headline, _comment(path)


def methods() -> Rows:
    """Every method that has a name."""
    for name, method in METHODS.items():
        yield (
            f"`{name}`",
            f"{method.made_of} {100 * method.sparsity:g}%" if method.prunes else method.made_of,
            _comment(CONF / "method" / f"{name}.yaml"),
        )


def statistics() -> Rows:
    """Every statistic."""
    for name, one in STATISTICS.items():
        yield f"`{name}`", "the prompt's, a bound" if one.oracle else "the prompt's"
    yield from ((f"`{name}`", "each token's own, masked") for name in TOKEN_STATISTICS)


def models() -> Rows:
    """Every model."""
    for path in _files("model"):
        model: Any = OmegaConf.load(path)
        place = model.get("repo") or model.get("package") or "random weights"
        yield f"`{path.stem}`", model.source, place, model.get("dtype", "float32"), _comment(path)


HEADS = {
    keys: "| key | default | what it is |",
    tasks: "| task | kind | headline | what it is |",
    methods: "| method | settings | what it is |",
    statistics: "| statistic | whose neurons |",
    models: "| model | source | where | dtype | |",
}


def _table(make: Callable[[], Rows]) -> str:
    head = HEADS[make]
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in make()]
    return "\n".join([head, "|---" * head.count(" | ") + "|---|", *lines])


def main() -> None:
    """Write the tables, or only check them."""
    before = PAGE.read_text(encoding="utf-8")
    tables = {make.__name__: make for make in HEADS}
    after = _TABLE.sub(lambda found: f"{found[1]}\n{_table(tables[found[2]])}\n\n{found[3]}", before)
    if before != after and "--check" in sys.argv[1:]:
        sys.exit(f"{PAGE.name}: stale tables; python -m pipelines.docs_tables writes them")
    PAGE.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
