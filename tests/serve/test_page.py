"""The page at ``/`` in a real browser: two answers stream, stop works, errors show, nothing leaves the machine."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from finetune.serve.app import build_app
from finetune.serve.config import ServeConfig
from finetune.serve.page import FILES, MOST_SAMPLES, add_page, read_samples
from finetune.serve.service import Service
from tests.fixtures.artifacts import Made
from tests.fixtures.served import Served, listening, wait_until

SAMPLES = [
    {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Wake me."}],
        "reference": "7",
    }
]


@pytest.fixture(scope="module")
def page_url(server: Served) -> Iterator[str]:
    """The page in front of the models that the other tests share, with a key."""
    config = ServeConfig(api_key="secret", max_output_tokens=400, concurrent=8)
    app = build_app(Service(server.opened.engines, config))
    add_page(app, SAMPLES)
    with listening(app) as url:
        yield url


@pytest.mark.parametrize("path", FILES)
def test_files_need_no_key_and_name_no_other_server(page_url: str, path: str) -> None:
    reply = httpx.get(page_url + path, trust_env=False)
    assert reply.status_code == 200
    assert "http://" not in reply.text
    assert "https://" not in reply.text
    assert "default-src 'none'" in reply.headers["Content-Security-Policy"]


def test_samples_need_the_key(page_url: str) -> None:
    assert httpx.get(f"{page_url}/samples", trust_env=False).status_code == 401
    reply = httpx.get(f"{page_url}/samples", trust_env=False, headers={"Authorization": "Bearer secret"})
    assert reply.json() == SAMPLES


def test_samples_are_the_held_out_chats_of_the_run(heldout: Made, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "heldout").symlink_to(heldout.folder / "heldout")
    samples = read_samples(tmp_path)
    assert 0 < len(samples) <= MOST_SAMPLES
    assert samples[0]["messages"][0]["content"].startswith("Wake me at 0 on Monday")
    assert read_samples(tmp_path / "data") == []


@pytest.fixture
def opened(browser: Any, page_url: str) -> Iterator[Any]:
    """The page with its key given; every request and every error of its script is kept."""
    context = browser.new_context(viewport={"width": 1000, "height": 900})
    page = context.new_page()
    page.asked, page.broken = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.broken.append(str(error)))
    page.goto(page_url)
    page.get_by_label("API key of this server").fill("secret")
    page.get_by_role("button", name="Use key").click()
    page.get_by_role("button", name="Use key").wait_for(state="hidden")
    page.wait_for_selector(".model option", state="attached")
    yield page
    assert page.broken == []
    assert {url.removeprefix(page_url).split("/")[0] for url in page.asked if not url.startswith("data:")} == {""}
    context.close()


def _texts(page: Any) -> list[str]:
    return [turn.inner_text() for turn in page.locator(".turn.assistant").all()]


def _ask(page: Any, text: str, *, tokens: int) -> None:
    page.locator("#settings").evaluate("element => element.open = true")
    page.get_by_label("Longest answer, in tokens").fill(str(tokens))
    page.get_by_label("Your message").fill(text)
    page.get_by_label("Your message").press("Control+Enter")


def _wait(page: Any, status: str) -> None:
    wait_until(lambda: [side.inner_text() for side in page.locator(".status").all()] == [status, status])


def test_two_models_answer_next_to_each_other(opened: Any, server: Served) -> None:
    _ask(opened, "Wake me at seven on Monday, please.", tokens=12)
    _wait(opened, "reached the longest answer")
    assert [title.inner_text() for title in opened.locator("h2").all()] == ["base", "tiny"]
    body = {"messages": [{"role": "user", "content": "Wake me at seven on Monday, please."}], "max_tokens": 12}
    for text, model in zip(_texts(opened), ("base", "tiny"), strict=True):
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=body | {"model": model}, trust_env=False)
        assert " ".join(text.split()) == " ".join(reply.json()["choices"][0]["message"]["content"].split())


def test_stop_ends_both_answers_and_the_page_goes_on(opened: Any) -> None:
    _ask(opened, "Tell me a story.", tokens=400)
    wait_until(lambda: all(_texts(opened)) and len(_texts(opened)) == 2)
    opened.get_by_role("button", name="Stop").click()
    _wait(opened, "stopped")
    assert opened.get_by_role("button", name="Send").is_enabled()


def test_long_conversation_scrolls_inside_its_side(opened: Any) -> None:
    _ask(opened, "Go on.\n" * 20, tokens=40)
    _wait(opened, "reached the longest answer")
    sizes = opened.locator(".turns").evaluate_all("all => all.map(e => [e.scrollHeight, e.clientHeight, e.scrollTop])")
    for content, visible, top in sizes:
        assert content > visible
        assert top > 0
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_error_of_the_server_shows_as_an_alert(opened: Any) -> None:
    _ask(opened, "Hello", tokens=9999)
    alert = opened.get_by_role("alert")
    alert.wait_for()
    assert "this server writes at most 400 tokens; got 9999" in alert.inner_text()


def test_sample_fills_message_and_system_message(opened: Any) -> None:
    opened.get_by_text("Held-out samples of the run").click()
    opened.get_by_role("button", name="Wake me.").click()
    assert opened.get_by_label("Your message").input_value() == "Wake me."
    assert opened.locator("#system").input_value() == "Be brief."
    assert opened.get_by_text("Expected answer: 7").is_visible()


def test_curl_asks_the_same_without_the_key_in_it(opened: Any) -> None:
    _ask(opened, "It's me", tokens=5)
    _wait(opened, "reached the longest answer")
    opened.get_by_role("button", name="Copy as curl").first.click()
    command = opened.locator(".command").first.inner_text()
    assert "secret" not in command
    assert "$FINETUNE_API_KEY" in command
    sent = json.loads(command.split(" -d '", 1)[1][:-1].replace("'\\''", "'"))
    assert (sent["model"], sent["max_tokens"], sent["messages"][-1]["content"]) == ("base", 5, "It's me")


def test_keyboard_reaches_everything_and_every_field_has_a_name(opened: Any) -> None:
    opened.locator("#settings").evaluate("element => element.open = true")
    nameless = opened.evaluate(
        "[...document.querySelectorAll('input, select, textarea')]"
        ".filter(e => !e.labels || !e.labels.length).map(e => e.id)"
    )
    assert nameless == []
    reached = set()
    for _ in range(30):
        opened.keyboard.press("Tab")
        reached.add(opened.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"prompt", "send", "new", "temperature", "model", "turns", "curl"} <= reached


def test_narrow_screen_puts_the_sides_below_each_other(opened: Any) -> None:
    opened.set_viewport_size({"width": 360, "height": 700})
    first, second = (side.bounding_box() for side in opened.locator(".side").all())
    assert second["y"] >= first["y"] + first["height"]
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
