"""One job: a configuration in, a record for each of its methods out, and what became of them.

What takes seconds to import is imported once the configuration is known to be good, so that a mistake is told at
once.
"""

from __future__ import annotations

import sys
import traceback
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig
from tqdm import tqdm

from pipelines import sweeps, tasks
from pipelines.composition import Call, current_call
from pipelines.config import RunConfig
from pipelines.config_keys import typed
from pipelines.errors import UserError, first_line, out_of_memory
from pipelines.evaluation import evaluate, forget_model
from pipelines.method_keys import planned
from pipelines.methods import Method, identity, label, unused
from pipelines.run_folder import RunFolder, run_id
from pipelines.sweeps import FAILED, ManifestEntry, RunStatus, merged, of_this_call, wait_for_held


def job(cfg: DictConfig) -> list[RunStatus]:
    """Run one composed configuration. Whatever goes wrong fails this job alone, in one line, and not the sweep.

    A single call waits for runs that another process holds; of a sweep's job they are the sweep's business.
    """
    call = current_call()
    try:
        config = typed(cfg)
    except UserError as error:
        found = [RunStatus("", FAILED, reason=_told(error))]
    else:
        found = attempt(config, call)
        while call.single and wait_for_held(found):
            found = merged(found, attempt(config, call))
    if call.single:
        of_this_call.append(("", found))
    return found


def attempt(config: RunConfig, call: Call) -> list[RunStatus]:
    """Evaluate every method of a configuration, and say what became of each."""
    try:
        return run(config, call)
    except Exception as error:
        reason = _told(error)
    with suppress(UserError):
        ManifestEntry(config).note(failed=reason)
    return [RunStatus(label(config, method), FAILED, reason=reason) for method in config.methods()]


def run(config: RunConfig, call: Call) -> list[RunStatus]:
    """Evaluate every method of a configuration, skipping those that have a record or that another process holds.

    Bad data or an output folder that cannot be written raise UserError; what goes wrong later is in the statuses.
    """
    kind, here = tasks.module_of(config.task.kind), config.settled()
    items = kind.read(here)
    from pipelines.models import device_kind

    for override in unused(call.overrides, config):
        print(f"note: {override} changes nothing in this call", file=sys.stderr)
    methods = config.methods()
    for method in planned(config) if config.kind.prunes else ():
        if method not in methods:
            print(f"note: task={config.task.name} generates no text, so {method.label} is left out", file=sys.stderr)
    device = device_kind(config.device)
    folders: dict[Method, RunFolder] = {}
    for method in methods:
        readable = "-".join([config.task.name, config.model.name, method.label.replace(" ", "-").replace("%", "")])
        folders[method] = RunFolder(Path(config.output_dir), run_id(readable, identity(config, method, device)))
    ManifestEntry(config).note(runs=[folder.run_id for folder in folders.values()], failed=None)

    found: dict[Method, RunStatus] = {}
    reason = None
    with ExitStack() as claims:
        for method, folder in folders.items():
            claims.callback(folder.release)
            if folder.record() is None and not folder.claim():
                found[method] = RunStatus(label(config, method), sweeps.HELD, folder.path)
            elif folder.record() is not None:  # perhaps since a moment ago
                found[method] = RunStatus(label(config, method), sweeps.SKIPPED, folder.path)
                tags = folder.add_tags(config.tags)
                told = f"; tags added: {', '.join(tags)}" if tags else ""
                print(f"{folder.path}: finished before, skipped{told}", file=sys.stderr)
        unfinished = {method: folder for method, folder in folders.items() if method not in found}
        if unfinished:
            try:
                evaluate(here, kind, items, unfinished, folders, call)
            except Exception as error:
                reason = _told(error)
        for method, folder in unfinished.items():
            found[method] = RunStatus(label(config, method), sweeps.FINISHED, folder.path)
            if not folder.record():
                folder.fail(reason or "ended without a record")
                found[method] = replace(found[method], state=FAILED, reason=reason)
    return [found[method] for method in folders]


def _told(error: Exception) -> str:
    """Tell the user what went wrong, and return it as one line. Only a fault of our own gets a traceback."""
    if isinstance(error, UserError):
        reason = str(error)
    elif out_of_memory(error):
        reason = f"out of memory ({first_line(error)}); use a smaller batch_size or model, or a larger device"
        forget_model()
    else:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {first_line(error)}"
    tqdm.write(f"error: {reason}", file=sys.stderr)
    return reason
