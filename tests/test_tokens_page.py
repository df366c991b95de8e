"""docs/tokens.md is what the code of the line exports."""

from tests.fixtures.scripts import script


def test_page_is_what_the_script_writes() -> None:
    maker = script("make_tokens_page")
    assert maker.PAGE.read_text(encoding="utf-8") == maker.page(), "run scripts/make_tokens_page.py: the page is old"
