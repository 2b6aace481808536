"""Real runs of a tiny model, and processes that read and report them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from loopback import ENTITY, LoopbackWandb

REPOSITORY = Path(__file__).resolve().parents[2]
# Many calls in one process: most of a short call is imports.
SCRIPT = """
import sys
from pipelines import run
for call in open(sys.argv[1]).read().splitlines():
    sys.argv = ["run.py", *call.split()]
    run.main()  # ends the process if a run fails
"""


@dataclass(frozen=True)
class Lab:
    """Finished runs.

    Attributes:
        root: an empty home, too.
        out: the run folders.
        server: has the same runs.
        variables: the environment of a process that may write to the server.
    """

    root: Path
    out: Path
    server: LoopbackWandb
    variables: dict[str, str]

    @property
    def project(self) -> str:
        return f"wandb:{ENTITY}/griffin"

    def python(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """A process that may write to the server."""
        return python(self.root, *arguments, **self.variables | variables)


def python(home: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A process in a folder that is its home, too."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=plain_environment(home) | variables,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def plain_environment(home: Path) -> dict[str, str]:
    """The environment without anybody's settings."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "WANDB_", "HYDRA_", "XDG_"))}
    kept = {key: value for key, value in kept.items() if not key.lower().endswith("_proxy")}
    return kept | {"HOME": str(home), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
