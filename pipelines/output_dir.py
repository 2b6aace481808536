"""The one argument of the commands that look at an output folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def output_dir_argument(command: str, description: str) -> Path:
    """The folder named on the command line; the process ends with one line if it is none.

    Args:
        command: the module that was called.
        description: what it does, for --help.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {command}", description=description.split("\n\n")[0])
    parser.add_argument("output_dir", metavar="DIR", type=Path, help="an output_dir of pipelines.run")
    output_dir: Path = parser.parse_args().output_dir
    if not output_dir.is_dir():
        sys.exit(f"error: {output_dir}: {'not a folder' if output_dir.exists() else 'no such folder'}")
    return output_dir
