import pytest
from jinja2 import UndefinedError

from finetune.html import Figure, Table, render
from finetune.html.render import TEMPLATES, _environment


def page(**values: object) -> str:
    imports = '{% from "parts.html" import figure, table %}'
    return _environment().from_string(f"{imports}{{{{ table(shown) }}}}{{{{ figure(drawn) }}}}").render(**values)


def test_text_cannot_become_markup() -> None:
    shown = Table(header=["<b>"], rows=[["<script>"]])
    text = page(shown=shown, drawn=Figure(picture="<svg>", caption="<i>"))
    assert "&lt;script&gt;" in text
    assert not any(markup in text for markup in ("<script>", "<b>", "<i>", "<svg>"))


def test_figures_are_right_aligned_and_strong_rows_stand_out() -> None:
    shown = Table(header=["name", "count"], rows=[["a", "1"], ["b", "2"]], strong=frozenset({1}))
    text = page(shown=shown, drawn=None)
    assert '<tr><td>a</td><td class="n">1</td></tr>' in text
    assert '<tr class="strong"><td>b</td><td class="n">2</td></tr>' in text
    assert "<figure" not in text


def test_an_empty_table_is_left_out() -> None:
    assert page(shown=Table(header=["name"], rows=[]), drawn=None).strip() == ""


def test_a_value_that_the_template_needs_and_nobody_gave_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="report"):
        render("report.html")


@pytest.mark.parametrize("template", sorted(file.name for file in TEMPLATES.glob("*.html")))
def test_every_template_compiles(template: str) -> None:
    _environment().get_template(template)
