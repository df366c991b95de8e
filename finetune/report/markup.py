"""Pieces of the page: tables, tiles, figures with captions. Everything that comes from a run is escaped here."""

from collections.abc import Iterable, Sequence
from html import escape


class Html(str):
    """Text that is markup already and must not be escaped again."""

    __slots__ = ()


def safe(content: object) -> str:
    return content if isinstance(content, Html) else escape(str(content))


def tag(name: str, content: object, *, kind: str = "") -> Html:
    attribute = f' class="{kind}"' if kind else ""
    return Html(f"<{name}{attribute}>{safe(content)}</{name}>")


def joined(parts: Iterable[object]) -> Html:
    return Html("".join(safe(part) for part in parts))


def section(anchor: str, title: str, *parts: object) -> Html:
    """A part of the page with its heading; empty where nothing is in it."""
    content = joined(parts)
    return Html(f'<section id="{escape(anchor)}"><h2>{escape(title)}</h2>{content}</section>') if content else Html("")


def figure(picture: str, caption: str, *, title: str = "", legend: Sequence[tuple[str, str]] = ()) -> Html:
    """A picture with what it shows in words; ``legend`` pairs a colour class with its meaning."""
    if not picture:
        return Html("")
    keys = "".join(f'<span class="key"><i class="swatch-{kind}"></i>{escape(name)}</span>' for kind, name in legend)
    head = f"<h3>{escape(title)}</h3>" if title else ""
    line = f'<div class="legend">{keys}</div>' if keys else ""
    return Html(f"<figure>{head}{line}{picture}<figcaption>{escape(caption)}</figcaption></figure>")


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    text_columns: int = 1,
    strong: frozenset[int] = frozenset(),
) -> Html:
    """A table; all but the first ``text_columns`` hold figures and are right-aligned; rows in ``strong`` stand out."""
    kinds = ["" if column < text_columns else "n" for column in range(len(header))]
    body = [
        tag(
            "tr",
            joined(tag("td", cell, kind=kind) for cell, kind in zip(row, kinds, strict=True)),
            kind="strong" if index in strong else "",
        )
        for index, row in enumerate(rows)
    ]
    heads = joined(tag("th", name, kind=kind) for name, kind in zip(header, kinds, strict=True))
    whole = f"<thead><tr>{heads}</tr></thead><tbody>{joined(body)}</tbody>"
    return Html(f'<div class="scroll"><table>{whole}</table></div>' if body else "")


def tiles(entries: Iterable[tuple[str, str, str]]) -> Html:
    """Small boxes of (name, figure, remark)."""
    boxes = [
        tag(
            "div",
            joined(
                [tag("div", name, kind="name"), tag("div", value, kind="figure"), tag("div", remark, kind="remark")]
            ),
            kind="tile",
        )
        for name, value, remark in entries
    ]
    return tag("div", joined(boxes), kind="tiles")


def pairs(entries: Iterable[tuple[str, object]]) -> Html:
    """Names and values, one pair a line."""
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{safe(value)}</dd>" for name, value in entries)
    return Html(f"<dl>{lines}</dl>") if lines else Html("")


def folded(title: str, content: object) -> Html:
    """Content that opens on a click; needs no script."""
    return Html(f"<details><summary>{escape(title)}</summary>{safe(content)}</details>")


def mark(good: bool, word: str) -> Html:
    """A sign and a word, so that colour is never the only difference."""
    sign = Html(f'<b aria-hidden="true">{"✓" if good else "✗"}</b> ')
    return tag("span", joined([sign, word]), kind="good" if good else "bad")
