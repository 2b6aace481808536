"""Methods side by side on a prompt of one's own, and which part of a text was drafted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from calling import ran, read_samples
from rich.text import Text

from pipelines import compare
from pipelines.compare import Written, side_by_side
from pipelines.records import DRAFTED, pieces

TINY = ("model=random_tiny", "task=briefs", "task.max_new_tokens=12")


def test_every_method_is_shown_as_it_writes_and_the_verified_one_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "_EVERY", 0.0)
    seen: dict[int, list[Written]] = {}
    config = compare.typed(compare.composed([*TINY, "grid.method=[griffin,exact]"])).settled()
    compare.write(config, "the tide the tide the tide", lambda place, one: seen.setdefault(place, []).append(one))
    assert [seen[place][-1].method for place in sorted(seen)] == ["dense", "griffin 50%", "exact 50%"]
    for shown in seen.values():
        assert [one.facts for one in shown[:-1]] == ["..."] * len(shown[:-1])
        assert all(shown[-1].text.plain.startswith(one.text.plain.rstrip("\ufffd")) for one in shown)
    assert seen[2][-1].text.plain == seen[0][-1].text.plain
    assert seen[2][-1].facts.endswith("the dense model's text")
    assert {span.style for span in seen[2][-1].text.spans} <= {DRAFTED, ""}
    for width, columns in ((200, 3), (40, 2)):
        assert len(side_by_side([shown[-1] for shown in seen.values()], width).columns) == columns


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("",), "the prompt is empty: expected some words"),
        (("tide", *TINY, "sparsity=2"), "sparsity=2: expected 0 <= sparsity < 1"),
        (("tide", "task=latency"), "task=latency: expected a task of kind generation, for its template and lengths"),
        (("tide " * 3000, *TINY), "tokens: expected at most"),
        (("tide", "sparsty=0.5"), "sparsty"),
        (("tide", "task=null"), "cannot compose"),
        (("tide", *TINY, "grid.method=[griffin]", "sparsity=[0.5,0.5]"), "model=random_tiny: sparsity has 2"),
    ],
)
def test_a_mistake_is_one_line(words: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["compare", *words])
    with pytest.raises(SystemExit, match=r"error: .*") as ended:
        compare.main()
    assert told in str(ended.value)
    assert "\n" not in str(ended.value)


def test_samples_say_which_part_of_a_text_was_drafted(tmp_path: Path) -> None:
    (folder,) = ran(
        f"output_dir={tmp_path / 'out'}", *TINY, "limit=6", "method=exact", "task.stop=nowhere", "wandb.mode=disabled"
    )
    seen = []
    for sample in read_samples(folder):
        checked: dict[str, Any] = sample["drafting"]
        assert sum(sample["accepted_by_check"]) == checked["accepted"]
        assert len(sample["accepted_by_check"]) == checked["checks"]
        found = pieces(sample["text"], sample["drafted_spans"])
        assert "".join(text for text, _ in found) == sample["text"]
        seen.append(any(drafted for _, drafted in found))
        assert checked["accepted"] or not seen[-1], (
            "accepted drafts may have no characters, as special tokens have none"
        )
        assert sample["prompt"].startswith("###\nArticle: ")
    assert any(seen)


def test_a_text_that_was_cut_keeps_what_is_left_of_its_pieces() -> None:
    assert pieces("abcdef", [(1, 3), (3, 5)]) == [("a", False), ("bc", True), ("de", True), ("f", False)]
    assert pieces("abc", [(1, 5), (6, 8)]) == [("a", False), ("bc", True)]
    assert pieces("abc", []) == [("abc", False)]
    assert pieces("", [(0, 2)]) == []
    assert Text.assemble(*((text, DRAFTED * drafted) for text, drafted in pieces("ab", [(0, 1)]))).plain == "ab"
