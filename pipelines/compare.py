"""`python -m pipelines.compare "your prompt"`: named methods side by side on a prompt of one's own, as they write.

Green is what was drafted and accepted, the rest of that text is the dense model's own. In a notebook
`compare("your prompt", "grid.method=[recipe,exact]")` shows the same.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

import griffin
from pipelines.composition import composed
from pipelines.config import RunConfig
from pipelines.config_keys import typed
from pipelines.errors import UserError, told_in_one_line
from pipelines.records import DRAFTED, pieces
from pipelines.tasks.answers import begin_alike, drafted_spans

USAGE = """python -m pipelines.compare "your prompt" [KEY=VALUE ...]

The keys are those of python -m pipelines.run, for example 'grid.method=[recipe,exact]', sparsity=0.7, model=MODEL,
task.max_new_tokens=200, task.chat_template=false (the prompt as it is, and not as what a user says in a chat)."""

# What is compared, and how, unless the call says otherwise.
DEFAULTS = {"task": "briefs_chat", "task.max_new_tokens": "80", "grid.method": "[dense,griffin,recipe,int8,exact]"}

_NARROW = 24  # characters a column; with less for each, methods are below each other
_EVERY = 0.2  # seconds between two views of a text


@dataclass
class Written:
    """What a method has written so far, and, when it is done, what that took."""

    method: str
    text: Text
    facts: str = "..."


def compare(prompt: str, *overrides: str) -> None:
    """Show what methods make of a prompt, in the terminal or below a notebook's cell.

    Raises:
        UserError: a value that is not allowed; a prompt that is empty, or too long for the model.
    """
    given = {override.partition("=")[0] for override in overrides}
    given |= {"task.max_new_tokens"} if "task" in given else set()
    defaults = [f"{key}={value}" for key, value in DEFAULTS.items() if not {key, key.removeprefix("grid.")} & given]
    config = typed(composed([*defaults, *overrides])).settled()
    if not prompt.strip():
        raise UserError("the prompt is empty: expected some words")
    if config.task.kind != "generation":
        raise UserError(f"task={config.task.name}: expected a task of kind generation, for its template and lengths")
    console, written = Console(highlight=False), dict[int, Written]()
    with _shown(console) as update:

        def show(place: int, one: Written) -> None:
            written[place] = one
            update(side_by_side([*written.values()], console.width))

        write(config, prompt, show)


@contextmanager
def _shown(console: Console) -> Iterator[Callable[[Table], None]]:
    """What shows a table in the place of the one before; in what is no terminal, the last one."""
    if console.is_jupyter:
        from IPython.display import display

        handle: Any = display(display_id=True)
        yield handle.update
        return
    with Live(console=console, auto_refresh=False) as live:
        yield lambda table: live.update(table, refresh=True)


def write(config: RunConfig, prompt: str, show: Callable[[int, Written], None]) -> None:
    """Continue a prompt by every method, dense first, and show now and then the method's place and its text so far."""
    from pipelines.evaluation import kept_model
    from pipelines.tasks.generation import end_tokens
    from pipelines.tasks.prompts import Evaluation

    methods = [griffin.DENSE, *(method for method in config.methods() if not method.dense)]
    loaded = kept_model(config.model, config.device, config.seed, False, bool(config.cpu_onednn and not config.compile))
    ids, length = loaded.encode(prompt, config.task.chat_template), config.task.max_new_tokens
    if len(ids) > (most := loaded.context_length - length):
        raise UserError(f"a prompt of {len(ids)} tokens: expected at most {most}, with task.max_new_tokens={length}")
    run, ends = Evaluation(loaded, config, methods, {}), end_tokens(loaded)
    try:
        state = run.prefill(ids)
        for method in methods:
            method.kept(run.engine.widths)
    except (griffin.UnsupportedModelError, ValueError) as error:
        raise UserError(f"model={config.model.name}: {error}") from error
    dense: tuple[griffin.Row, float] | None = None
    for place, method in enumerate(methods):
        began = last = time.perf_counter()
        aside = 0.0  # seconds of showing

        def text(row: griffin.Row) -> Text:
            found = loaded.tokenizer.decode(row.tokens, skip_special_tokens=True)
            return Text.assemble(
                *((part, DRAFTED * drafted) for part, drafted in pieces(found, drafted_spans(row, loaded)))
            )

        def ended(row: griffin.Row) -> bool:
            nonlocal aside, last
            if (now := time.perf_counter()) - last > _EVERY:
                show(row.label, Written(row.method.label, text(row)))
                last = time.perf_counter()
                aside += last - now
            return row.tokens[-1] in ends

        rows = griffin.begin(run.engine, [state], method, config.seed, [place])
        generation = griffin.Generation(length, ended)
        for row in griffin.decode(run.engine, iter(rows), generation, max_prompt_tokens=len(ids)):
            seconds = time.perf_counter() - began - aside
            dense = dense or (row, seconds)
            show(place, Written(method.label, text(row), facts(row, seconds, *dense, run.traffic.get(method))))


def facts(
    row: griffin.Row, seconds: float, dense: griffin.Row, dense_seconds: float, traffic: griffin.Traffic | None
) -> str:
    """What a text took behind its prompt, in words, beside the dense model's."""
    lines = [f"{len(row.tokens)} tokens in {seconds:.1f} s"]
    if traffic is None:
        return lines[0]
    taken = row.statistics(traffic)
    lines += [f"{len(row.tokens) / seconds / (len(dense.tokens) / dense_seconds):.2f} times dense's speed"]
    lines += [f"{taken.effective_density:.2f} of its bytes per token"]
    lines += [] if taken.acceptance is None else [f"{taken.acceptance:.2f} of drafts accepted"]
    same = begin_alike(row.tokens, dense.tokens)
    lines += ["the dense model's text" if row.tokens == dense.tokens else f"as dense for {same} tokens"]
    return "\n".join(lines)


def side_by_side(written: Sequence[Written], width: int) -> Table:
    """The texts in columns, or in rows where the terminal is narrow."""
    if width < _NARROW * len(written):
        table = Table("method", "text", show_lines=True)
        for one in written:
            table.add_row(f"{one.method}\n\n{one.facts}", one.text)
        return table
    table = Table(*(Column(one.method, ratio=1, overflow="fold") for one in written), expand=True, show_lines=True)
    table.add_row(*(one.text for one in written))
    table.add_row(*(one.facts for one in written))
    return table


def main() -> None:
    """Run the command. A mistake ends it with one line."""
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & {*words}:
        print(USAGE, file=sys.stdout if words else sys.stderr)
        sys.exit(0 if words else 2)
    with told_in_one_line():
        compare(words[0], *words[1:])


if __name__ == "__main__":
    main()
