"""docs/models.md is what the options, the experiments and the code give."""

from tests.fixtures.scripts import script


def test_page_is_what_the_script_writes() -> None:
    maker = script("make_models_page")
    assert maker.PAGE.read_text(encoding="utf-8") == maker.page(), "run scripts/make_models_page.py: the page is old"


def test_no_option_is_of_a_model_that_is_listed_as_missing() -> None:
    maker = script("make_models_page")
    assert not {option.name for _, option in maker.options()} & set(", ".join(maker.MISSING).split(", "))
