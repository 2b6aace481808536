"""The project as a whole: presets from the command line; a copy whose method has one axis more, by the lines that
docs/development.md shows; the package as pip installs it; and which module imports which, without circles, each outside
tool in one place.
"""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from benchmark import PAPER, SHAPES
from calling import REPOSITORY, command, composed, process, read_record, run_folder, run_folders, tiny, write_rows

from analysis.contents import make_report

PACKAGES = ("griffin", "pipelines", "analysis", "conf", "hydra_plugins")
ORDINARY = ["grid.sparsity=[0,0.5]", "limit=2"]


def copied(folder: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(REPOSITORY / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))


def with_the_axis(folder: Path) -> Path:
    copied(folder)
    section = (
        (REPOSITORY / "docs" / "development.md").read_text(encoding="utf-8").partition("## An axis of the method")[2]
    )
    (block,) = re.findall(r"```python\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
    field, rule, use = (part.partition("\n")[2].rstrip() + "\n" for part in block.split("\n\n"))
    assert len(block.splitlines()) <= 12
    path = folder / "griffin" / "method.py"
    code = path.read_text(encoding="utf-8")
    for before, after in (
        ("\n    def __post_init__(self) -> None:\n", f"{field}\n    def __post_init__(self) -> None:\n{rule}"),
        ("        return kept_per_layer(widths, self.sparsity, self.budget)\n", use),
    ):
        assert code.count(before) == 1
        code = code.replace(before, after)
    path.write_text(code, encoding="utf-8")
    return folder


def test_a_new_axis_is_a_key_a_grid_a_record_and_a_row_of_the_report(tmp_path: Path) -> None:
    project, out = with_the_axis(tmp_path / "project"), tmp_path / "out"
    run = [sys.executable, "-m", "pipelines.run", *tiny(out, *ORDINARY)]
    old = process(run, tmp_path, PYTHONPATH=str(REPOSITORY))
    before = {folder.name for folder in run_folders(out)}
    assert (old.code, len(before)) == (0, 2)
    ended = process([*run, "grid.multiple=[1,24]"], tmp_path, PYTHONPATH=str(project))
    assert ended.code == 0, ended.err
    assert len(ended.lines(str(out))) == 2, "both are the runs that they were"
    (added,) = [folder for folder in run_folders(out) if folder.name not in before]
    record = read_record(added)
    assert (record["method"]["label"], record["method"]["multiple"]) == ("griffin multiple of 24 50%", 24)
    densities = {read_record(folder)["metrics"].get("effective_density") for folder in run_folders(out)}
    assert len(densities) == 3, "it prunes otherwise"
    refused = process([*run, "multiple=0"], tmp_path, PYTHONPATH=str(project))
    assert refused.lines("error: ") == ["error: multiple=0: expected 1 or more"]
    shown = process([sys.executable, "-m", "pipelines.run", "--help"], tmp_path, PYTHONPATH=str(project))
    assert "each layer keeps a multiple of so many neurons (1)" in shown.out
    report = [sys.executable, "-m", "analysis.report", f"runs={out}", f"out={tmp_path / 'report'}"]
    assert process(report, tmp_path, PYTHONPATH=str(project)).code == 0
    assert "griffin multiple of 24 50%" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")


def test_a_wheel_runs_from_any_folder(tmp_path: Path) -> None:
    source = tmp_path / "source"
    copied(source)
    for name in ("README.md", "LICENSE", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, source)
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


def imported_names(path: Path) -> set[str]:
    """What a file imports: `from a import b` is both a and a.b, because b may be a module."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{one.name}" for one in node.names)}
    return names


IMPORTS = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): imported_names(path)
    for folder in ("pipelines", "hydra_plugins/griffin_sweeps")
    for path in (REPOSITORY / folder).rglob("*.py")
}


def test_no_module_imports_itself_by_way_of_others() -> None:
    TopologicalSorter({module: names & IMPORTS.keys() for module, names in IMPORTS.items()}).prepare()


@pytest.mark.parametrize(
    ("tool", "places"),
    [
        ("hydra", ["pipelines.composition"]),
        ("wandb", ["pipelines.tracking"]),
        ("lm_eval", ["pipelines.tasks.harness_model", "pipelines.tasks.lm_eval_adapter"]),  # our model, its tasks
    ],
)
def test_a_tool_is_imported_in_one_place_of_the_pipeline(tool: str, places: list[str]) -> None:
    importing = [
        module
        for module, names in IMPORTS.items()
        if module.startswith("pipelines.") and any(name.partition(".")[0] == tool for name in names)
    ]
    assert sorted(importing) == places


# One file serves all tasks: each reads its own fields.
ROW = {
    "question": "A boat carries 4 crates and 3 more are loaded. How many crates are on it?",
    "answer": "4 + 3 = 7\n#### 7",
    "document": "The ferry was late again on Monday.",
    "summary": "A late ferry.",
    "prompt": 'def half(number):\n    """Half of an even number."""\n',
    "entry_point": "half",
    "canonical_solution": "    return number // 2\n",
    "test": "def check(candidate):\n    assert candidate(4) == 2\n",
}
METHODS = 1 + 9 * 4  # dense; six of prompts and three of tokens at four sparsities


def test_the_preset_runs_and_its_report_says_how_far_each_method_goes(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [ROW | {"id": str(number)} for number in range(4)])
    shared = ["experiment=critical_sparsity", "limit=4", "wandb.mode=disabled", f"output_dir={tmp_path / 'out'}"]
    shared += [f"task.data_files={data}", "task.chat_template=true", "task.max_new_tokens=4"]
    both = process(command(*shared, f"task.shots_file={data}"), tmp_path, timeout=280, HF_HUB_OFFLINE="1")
    assert both.code == 0, both.err
    code = ["task=humaneval", "grid.sparsity=[0,0.5]"]
    refused = process(command(*shared, *code), tmp_path)
    refused.refused("error: task.allow_code_execution=false")
    allowed = process(command(*shared, *code, "task.allow_code_execution=true"), tmp_path, timeout=280)
    assert allowed.code == 0, allowed.err

    folders = run_folders(tmp_path / "out")
    assert len(folders) == 2 * METHODS + 1 + 9
    assert {read_record(folder)["metrics"]["samples"] for folder in folders} == {4}
    report = make_report(str(tmp_path / "out"))
    (table,) = [table for table in report.tables if table.name == "critical_sparsity"]
    assert len(table.rows) == 3 * 9
    (group,) = [group for group in report.groups if group.title == "Quality against bytes of weights per token"]
    assert len(group.drawings) == 3


@pytest.mark.parametrize("shape", PAPER)
def test_the_benchmark_times_the_same_shapes(shape: str) -> None:
    assert composed(f"model=random_{shape}").model.architecture == SHAPES[shape]
