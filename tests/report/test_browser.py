"""The report in a real browser: nothing is asked of the network or overflows, and the contents lead to each part."""

from pathlib import Path
from typing import Any

import pytest

from finetune.report import report


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "dark")])
def test_report_in_a_browser(run: Path, browser: Any, width: int, scheme: str) -> None:
    file = report(run).html
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    messages, requests = [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    assert messages == []
    assert requests == [file.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background.strip("rgb()").split(","))) < 300) == (scheme == "dark")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#use"
    page.click("nav a[href='#exports']")
    top = page.evaluate("document.getElementById('exports').getBoundingClientRect().top")
    assert -1 < top < 900  # scrolling stops at whole pixels
    context.close()
