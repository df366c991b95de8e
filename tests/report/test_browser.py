"""Pages in a real browser: quiet, offline, usable by keyboard, and complete without a script."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.html import Figure, Table, render
from finetune.html.lengths import length_picture
from finetune.report import report

SCREENS = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]
Open = Callable[..., Any]


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Opens a file; fails where the page writes to the console, asks for another file, or is wider than the screen."""
    contexts, problems = [], []

    def open_file(file: Path, width: int = 1280, scheme: str = "light", **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: request.url == file.as_uri() or problems.append(request.url))
        page.goto(file.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, background.strip("rgb()").split(","))) < 300) == (scheme == "dark")
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert not problems


@pytest.fixture
def preview(tmp_path: Path) -> Path:
    """The preview of the data, with a picture and text that is trained on."""
    texts = {"What? ": False, "x" * 300: True}
    stretches = [{"text": text, "is_trained": is_trained, "is_end": False} for text, is_trained in texts.items()]
    row = {"place": "rows.jsonl:1", "facts": ["9 tokens"], "stretches": stretches, "more": 0, "is_undesirable": False}
    histogram = {"edges": [0, 10, 20, 30], "rows": [3, 1, 2]}
    empty = Table(header=["a", "b"], rows=[])
    page = render(
        "preview.html",
        title="rows.jsonl",
        tiles=[("rows read", "6")],
        warnings=["Something."],
        sources=empty,
        lengths=Figure(picture=length_picture(histogram, limit=20)),
        thresholds=empty,
        legend=None,
        train=[{**row, "rejected": None}],
        heldout=[],
        dropped=empty,
        examples=empty,
    )
    file = tmp_path / "preview.html"
    file.write_text(page)
    return file


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_report_is_quiet_and_its_contents_lead_to_each_part(
    run: Path, open_page: Open, width: int, scheme: str
) -> None:
    page = open_page(report(run).html, width, scheme)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#use"
    page.click("nav a[href='#exports']")
    top = page.evaluate("document.getElementById('exports').getBoundingClientRect().top")
    assert -1 < top < 900  # scrolling stops at whole pixels


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_preview_is_quiet_and_its_bars_name_their_rows(preview: Path, open_page: Open, width: int, scheme: str) -> None:
    page = open_page(preview, width, scheme)
    page.focus("#lengths svg")
    page.keyboard.press("Home")
    assert page.inner_text(".tip") == "3 rows of 0 to 10 tokens"
    page.keyboard.press("ArrowRight")
    assert page.inner_text(".tip") == "1 row of 10 to 20 tokens"


def test_chart_shows_the_value_under_the_pointer_and_forgets_it_afterwards(run: Path, open_page: Open) -> None:
    page = open_page(report(run).html)
    chart = page.locator("#training svg").first
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    middle = (56 + 940) / 2 / 960  # of the axis, as a share of the picture
    page.mouse.move(box["x"] + middle * box["width"], box["y"] + 100)
    assert page.locator(".tip").is_visible()
    assert page.inner_text(".tip").startswith("step 60: ")
    page.mouse.move(1, 1)
    assert not page.locator(".tip").is_visible()


def test_arrow_keys_go_through_the_values_of_a_chart(run: Path, open_page: Open) -> None:
    page = open_page(report(run).html, width=390)
    page.focus("#training svg")
    keys = {"Home": 1, "ArrowRight": 2, "ArrowDown": 3, "ArrowLeft": 2, "PageUp": 1, "PageDown": 11, "End": 120}
    for key, step in keys.items():
        page.keyboard.press(key)
        assert page.inner_text(".tip").startswith(f"step {step}: "), key
        tip = page.locator(".tip").bounding_box()
        assert tip["x"] >= 0
        assert tip["x"] + tip["width"] <= 390
    page.keyboard.press("Escape")
    assert not page.locator(".tip").is_visible()


def test_keys_go_from_row_to_row_where_values_stand_in_rows(run: Path, open_page: Open) -> None:
    page = open_page(report(run).html)
    page.focus("#scores svg")
    shown = []
    for key in ("Home", "ArrowDown", "ArrowDown", "ArrowDown"):
        page.keyboard.press(key)
        shown.append(page.inner_text(".tip").partition(":")[0])
    assert shown == ["Base model", "Base, quantized", "Quantized + adapter", "Merged model"]


@pytest.mark.parametrize("with_script", [True, False])
def test_answers_are_filtered_by_keyboard_with_and_without_a_script(
    run: Path, open_page: Open, with_script: bool
) -> None:
    page = open_page(report(run).html, java_script_enabled=with_script)
    visible = "#answers tbody tr:visible"
    assert page.locator(visible).count() == 20
    page.focus("#answers [value=all]")
    page.keyboard.press("ArrowRight")
    assert (page.locator(visible).count(), page.locator(f"{visible}.wrong").count()) == (6, 6)
    page.keyboard.press("ArrowRight")
    assert (page.locator(visible).count(), page.locator(f"{visible}.right").count()) == (14, 14)


def test_pictures_and_their_values_are_there_without_a_script(run: Path, open_page: Open) -> None:
    page = open_page(report(run).html, java_script_enabled=False)
    assert page.locator("#training svg").first.bounding_box()["height"] > 200
    assert page.locator("#training svg title").count() > 100
