"""Fills a template. Autoescape is on: text from a run cannot become markup."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from finetune.html.format import FILTERS

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture with its words, for the macro ``figure``.

    Attributes:
        picture: SVG from `finetune.html.svg`.
        caption: What it shows.
        title: Heading above it.
        legend: Pairs of a colour class and its meaning.
    """

    picture: str
    caption: str = ""
    title: str = ""
    legend: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells for the macro ``table``.

    Attributes:
        header: Names of the columns.
        rows: Cells, as text.
        text_columns: Number of leading columns that hold text; the others hold figures and are right-aligned.
        strong: Rows that stand out.
        title: Heading above it.
        caption: What it shows.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1
    strong: frozenset[int] = frozenset()
    title: str = ""
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page made from ``sections.html``; left out where its parts are empty."""

    title: str
    parts: Sequence[Table | Figure]


def render(template: str, **values: Any) -> str:
    """Returns a page that loads nothing and runs no script but its own, which makes charts interactive.

    Args:
        template: A file name in ``finetune/html/templates``.
        values: What the template reads. A name that it reads and that is missing is an error.
    """
    page = _environment().get_template(template).render(**values)
    return page.encode("utf-8", errors="replace").decode("utf-8")  # decoded tokens may hold lone surrogates


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (TEMPLATES / "charts.js").read_text(encoding="utf-8")
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    environment.globals.update(script=Markup(script), script_hash=base64.b64encode(digest).decode())
    for function in (*FILTERS, breakable, stacked):
        environment.filters[function.__name__] = function
    return environment


def breakable(text: str) -> Markup:
    """Lets long answers wrap after a comma."""
    return escape(text).replace(",", Markup(",<wbr>"))


def stacked(text: str) -> Markup:
    """Puts the interval and the origin of a change on lines of their own."""
    return escape(text).replace(" [", Markup("<br>[")).replace(" from ", Markup("<br>from "))
