"""The package as pip installs it, away from its clone."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from calling import REPOSITORY, command, process, read_record, run_folder

PARTS = ("griffin", "pipelines", "analysis", "conf", "hydra_plugins", "README.md", "LICENSE", "pyproject.toml")


def test_a_wheel_runs_from_any_folder(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for part in PARTS:
        copy = shutil.copytree if (REPOSITORY / part).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(REPOSITORY / part, source / part)
    building = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    built = subprocess.run(building, capture_output=True, text=True, check=False)
    if "No matching distribution found for setuptools" in built.stderr:
        pytest.skip("building needs setuptools from an index")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    (tmp_path / "elsewhere").mkdir()
    overrides = ["model=random_tiny", "limit=1", "task.max_new_tokens=2", "wandb.mode=disabled", "output_dir=out"]
    ended = process(command(*overrides), tmp_path / "elsewhere", PYTHONPATH=str(tmp_path / "installed"))
    assert ended.code == 0, ended.err
    record = read_record(run_folder(tmp_path / "elsewhere" / "out"))
    assert record["environment"]["git_commit"] is None, "it ran from the clone"
