"""README and docs: short enough, without broken links, and with commands that are still understood."""

import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import benchmark
import hydra
import pytest
import yaml
from calling import REPOSITORY, by_hydra, composed
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf, open_dict

import griffin
from analysis import critical_sparsity, figures, leaderboard, report
from analysis.drawing import Styles
from analysis.figures import flocking
from analysis.frame import frame
from analysis.report import key_values
from analysis.runs import Runs
from pipelines import composition
from pipelines.config_keys import BAKE, checked, typed

README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
# To the end of the line; lines that a backslash continues, and inline code, are one line by then.
COMMAND = re.compile(
    r"python -m (pipelines\.run|pipelines\.bake|pipelines\.prefetch|analysis\.report|analysis\.leaderboard) (.*)"
)
FILES = ("task.data_files", "task.shots_file", "data_files")


def prose(page: Path) -> str:
    """What is no code: links in code are examples."""
    return re.sub(r"`[^`]*`", "", BLOCK.sub("", page.read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Every command of a page, in blocks and within lines: its module and its words.

    R stands for what the page says after "R is". Calls without any KEY=VALUE, such as `--help`, are left out.
    """
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    text = re.sub(r"(?<=[^`])`(python -m [^`]*)`", lambda found: "\n" + " ".join(found[1].split()) + "\n", text)
    stands_for = dict(re.findall(r"\b(R) is `([^`]*)`", text))
    for module, rest in COMMAND.findall(text):
        shortened = shlex.split(rest, comments=True)
        words = [one for word in shortened for one in (shlex.split(stands_for[word]) if word in stands_for else [word])]
        if any("=" in word for word in words):
            yield module, words


def points(words: Sequence[str]) -> list[list[str]]:
    """The overrides of every point of a call: sweeps, and experiments that sweep by themselves."""
    given = {word.partition("=")[0]: word for word in words if word != "-m"}
    if "experiment" in given:
        preset = OmegaConf.load(composition.CONF / f"{given['experiment'].replace('=', '/')}.yaml")
        swept = OmegaConf.select(preset, "hydra.sweeper.params") or {}
        given = {key: f"{key}={value}" for key, value in swept.items()} | given
    (found,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(list(given.values())), None)
    return found


def understood(overrides: Sequence[str]) -> None:
    """Refuse overrides that the entry would refuse."""
    if not any(one.lstrip("+").startswith("hydra.") for one in overrides):
        composed(*overrides)
        return
    config = by_hydra(overrides, return_hydra_config=True)
    with open_dict(config):
        del config["hydra"]
    typed(config)


CALLS = {
    f"{page.name}-{number}": (module, words)
    for page in PAGES
    for number, (module, words) in enumerate(commands(page), start=1)
}


def test_the_readme_can_be_read_in_a_minute() -> None:
    assert len(README.read_bytes()) < 9500


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if "://" not in link]
    broken = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_every_page_is_linked_from_the_readme() -> None:
    links = re.findall(r"\]\((docs/[^)#]+\.md)\)", prose(README))
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= {*links}


def test_development_tells_of_every_module() -> None:
    table = (REPOSITORY / "docs" / "development.md").read_text(encoding="utf-8").split("## Finding one's way")[1]
    named = {*re.findall(r"`(?:[\w/]+/)?(\w+\.py)`", table)}
    folders = ("griffin", "pipelines", "pipelines/tasks", "analysis")
    modules = {path.name for folder in folders for path in (REPOSITORY / folder).glob("*.py")}
    assert named == modules - {"__init__.py"}


@pytest.mark.parametrize("call", CALLS)
def test_commands_are_understood(call: str, tmp_path: Path) -> None:
    module, words = CALLS[call]
    if module == "analysis.report":
        report._parse(words)
    elif module == "analysis.leaderboard":
        key_values(words, leaderboard.USAGE, leaderboard._KEYS, {})
    else:
        rows = tmp_path / "rows"  # the data files of the examples are the reader's own
        rows.touch()
        there = [re.sub(rf"^({'|'.join(FILES)})=.*", rf"\1={rows}", word) for word in words]
        if module == "pipelines.bake":
            composition.register()
            with hydra.initialize_config_dir(str(composition.CONF), version_base="1.3"):
                checked(hydra.compose("bake", overrides=there), BAKE)
            return
        for overrides in points(there):
            understood(overrides)


def test_arguments_of_the_benchmark_are_understood() -> None:
    found = [words for page in PAGES for words in re.findall(r'BENCH="([^"]*)"', page.read_text(encoding="utf-8"))]
    assert found
    for words in found:
        benchmark._parse(words.split())


def test_what_the_report_suggests_is_understood() -> None:
    runs, styles = frame([]), Styles([])
    groups = [
        *(make(runs, styles) for make in (figures.against_sparsity, figures.against_speed, figures.by_length)),
        *(make(runs, styles) for make in (figures.predicted_speed, figures.latency)),
        critical_sparsity.against_bytes({}, styles),
        flocking(Runs([], [])),
    ]
    for group in groups:
        _, module, *words = shlex.split(group.command.replace("MODEL", "smollm2_135m"))[1:]
        assert module == "pipelines.run"
        for overrides in points(words):
            understood(overrides)


def test_commands_are_found() -> None:
    """So that the test above cannot pass by finding none."""
    found = {call.rpartition("-")[0] for call in CALLS}
    assert found >= {"README.md", "tasks.md", "performance.md", "selection.md", "verified-decoding.md", "sweeps.md"}


def test_what_names_the_version_names_this_one() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    changes = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    cited = README.read_text(encoding="utf-8")
    assert citation["version"] == griffin.__version__
    newest = f"{griffin.__version__}, {citation['date-released']}"
    assert re.findall(r"^## ([\d.]+, \S+)$", changes, re.MULTILINE)[0] == newest
    assert f"version = {{{griffin.__version__}}}" in cited
    assert citation["title"] == project["description"]
    assert project["description"] in " ".join(cited.split())
