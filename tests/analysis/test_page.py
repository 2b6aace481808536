"""The page in a real browser, wide and narrow, light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian's package)")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_opens_offline_and_shows_its_figures(width: int, dark: bool, browser: Browser, report: Path) -> None:
    page = report / "index.html"
    seen = browser.open(page, width, dark)
    assert seen.messages == []
    assert [address for address in seen.requests if not address.startswith("data:")] == [page.resolve().as_uri()]
    assert seen.page_width == width  # wide tables scroll in their own frames
    assert len(seen.images) == 11
    for image in seen.images:
        assert image["shown"]
        assert image["natural"] > 0
        assert 0 <= image["left"] < image["right"] <= width
        assert image["width"] >= 300  # the figures' own text is readable from there on
        assert image["height"] > 100


def test_dark_is_dark_with_figures_of_its_own(browser: Browser, report: Path) -> None:
    light, dark = (browser.open(report / "index.html", 1280, dark) for dark in (False, True))
    brightness = [sum(map(int, seen.colour.removeprefix("rgb(").rstrip(")").split(","))) for seen in (light, dark)]
    assert brightness[0] > 600 > 150 > brightness[1]
    assert [image["source"] for image in light.images] != [image["source"] for image in dark.images]


def test_the_browser_would_tell(browser: Browser, tmp_path: Path) -> None:
    # The tests above pass where nothing is seen: here is what they look for.
    page = tmp_path / "page.html"
    page.write_text(
        '<p style="width:2000px">wide</p><img src="http://127.0.0.1:9/x.png">'
        '<script>console.error("oh"); none()</script>'
    )
    seen = browser.open(page, 1280)
    assert any("oh" in message for message in seen.messages)
    assert any("none" in message for message in seen.messages)
    assert "http://127.0.0.1:9/x.png" in seen.requests
    assert seen.page_width > 1280
    assert [image["natural"] for image in seen.images] == [0]
