"""Which module imports which: no circles, and each outside tool in one place. Imports inside functions count, too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from calling import REPOSITORY

FILES = {
    path.relative_to(REPOSITORY): path
    for folder in ("pipelines", "hydra_plugins/griffin_sweeps")
    for path in (REPOSITORY / folder).rglob("*.py")
}


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imported_names(path: Path) -> set[str]:
    """What a file imports: `from a import b` is both a and a.b, because b may be a module."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{one.name}" for one in node.names)}
    return names


IMPORTS = {module_name(relative): imported_names(path) for relative, path in FILES.items()}


def test_no_module_imports_itself_by_way_of_others() -> None:
    for module in IMPORTS:
        reached, waiting = set[str](), [module]
        while waiting:
            for name in IMPORTS[waiting.pop()] & IMPORTS.keys() - reached:
                reached.add(name)
                waiting.append(name)
        assert module not in reached


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
