"""One job: a configuration in, a record for each of its methods out, and what became of them.

What takes seconds to import is imported once the configuration is known to be good, so that a mistake is told at
once.
"""

from __future__ import annotations

import sys
import traceback
from contextlib import ExitStack, suppress
from pathlib import Path

from omegaconf import DictConfig
from tqdm import tqdm

from pipelines import tasks
from pipelines.composition import Call, current_call
from pipelines.config import RunConfig
from pipelines.config_keys import typed
from pipelines.errors import UserError, out_of_memory
from pipelines.evaluation import evaluate, forget_model
from pipelines.methods import Method, identity, label, unused
from pipelines.run_folder import RunFolder, run_id
from pipelines.sweeps import run_status
from pipelines.sweeps.manifest import ManifestEntry
from pipelines.sweeps.run_status import FAILED, FINISHED, HELD, SKIPPED, RunStatus, held_folders, merged, wait_for


def job(cfg: DictConfig) -> list[RunStatus]:
    """Run one composed configuration. Whatever goes wrong fails this job alone, in one line, and not the sweep.

    A single call waits for runs that another process holds; of a sweep's job they are the sweep's business.
    """
    call = current_call()
    try:
        config = typed(cfg)
    except UserError as error:
        found = [RunStatus(" ".join(call.overrides), "", FAILED, reason=_told(error))]
    else:
        found = attempt(config, call)
        while call.single and (held := held_folders(found)):
            wait_for(held)
            found = merged(found, attempt(config, call))
    if call.single:
        run_status.of_this_call.append(found)
    return found


def attempt(config: RunConfig, call: Call) -> list[RunStatus]:
    """Evaluate every method of a configuration, and say what became of each."""
    try:
        return run(config, call)
    except Exception as error:
        reason = _told(error)
    words = f"{config.task.name} {config.model.name}"
    with suppress(UserError):
        ManifestEntry(config).fail(reason)
    return [RunStatus(words, label(config, method), FAILED, reason=reason) for method in config.methods()]


def run(config: RunConfig, call: Call) -> list[RunStatus]:
    """Evaluate every method of a configuration, skipping those that have a record or that another process holds.

    Raises:
        UserError: bad data, or an output folder that cannot be written. What goes wrong later is in the statuses.
    """
    kind, here = tasks.module_of(config.task.kind), config.settled()
    items = kind.read(here)
    from pipelines.models import device_kind

    for override in unused(call.overrides, config):
        print(f"note: {override} changes nothing in this call", file=sys.stderr)
    device = device_kind(config.device)
    words = f"{config.task.name} {config.model.name}"
    folders: dict[Method, RunFolder] = {}
    for method in config.methods():
        readable = "-".join([config.task.name, config.model.name, method.label.replace(" ", "-").replace("%", "")])
        folders[method] = RunFolder(Path(config.output_dir), run_id(readable, identity(config, method, device)))
    ManifestEntry(config).began([folder.run_id for folder in folders.values()])

    states: dict[Method, str] = {}
    reason = None
    with ExitStack() as claims:
        for method, folder in folders.items():
            claims.callback(folder.release)
            if folder.record() is None and not folder.claim():
                states[method] = HELD
            elif folder.record() is not None:  # perhaps since a moment ago
                states[method] = SKIPPED
                tags = folder.add_tags(config.tags)
                told = f"; tags added: {', '.join(tags)}" if tags else ""
                print(f"{folder.path}: finished before, skipped{told}", file=sys.stderr)
        unfinished = {method: folder for method, folder in folders.items() if method not in states}
        if unfinished:
            try:
                evaluate(here, kind, items, unfinished, folders, call)
            except Exception as error:
                reason = _told(error)
        for method, folder in unfinished.items():
            states[method] = FINISHED if folder.record() else FAILED
            if states[method] == FAILED:
                folder.fail(reason or "ended without a record")
    return [
        RunStatus(
            words, label(config, method), states[method], folder.path, reason if states[method] == FAILED else None
        )
        for method, folder in folders.items()
    ]


def _told(error: Exception) -> str:
    """Tell the user what went wrong, and return it as one line. Only a fault of our own gets a traceback."""
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, UserError):
        reason = str(error)
    elif out_of_memory(error):
        reason = f"out of memory ({first}); use a smaller batch_size or model, or a larger device"
        forget_model()
    else:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {first}"
    tqdm.write(f"error: {reason}", file=sys.stderr)
    return reason
