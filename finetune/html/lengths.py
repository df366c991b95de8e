"""Draws how many rows have how many tokens."""

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from finetune.html.svg import Axis, box, frame, line, picture, text, ticks

LEFT, TOP, RIGHT, BOTTOM = 56.0, 34.0, 940.0, 210.0
WIDTH, HEIGHT = 960, 254
LABEL_PIXELS = 90
"""Width kept free for the name of the limit."""


def length_picture(histogram: Mapping[str, Sequence[float]], *, limit: int | None) -> Markup:
    """Returns a histogram; bars beyond ``limit``, the longest row that is trained on, have a colour of their own.

    Args:
        histogram: ``edges`` in tokens and ``rows`` between each two of them; either may be missing.
        limit: ``data.max_tokens``, drawn as a line where it lies inside the picture.
    """
    edges, counts = histogram.get("edges") or [], histogram.get("rows") or []
    if not any(counts):
        return Markup("")
    across = Axis(ticks=ticks(0, edges[-1], wanted=8), name="tokens in a row", label=_whole)
    axes = frame((LEFT, TOP, RIGHT, BOTTOM), x=across, y=Axis(ticks=ticks(0, max(counts)), name="rows", label=_whole))
    parts = [*axes.parts]
    for low, high, rows in zip(edges, edges[1:], counts, strict=False):
        left, right, top = axes.x(low), axes.x(high), axes.y(rows)
        kind = "bar long" if limit is not None and low >= limit else "bar"
        hint = f"{rows:,.0f} {'row' if rows == 1 else 'rows'} of {low:,.0f} to {high:,.0f} tokens"
        parts.append(box(left + 1, top, max(right - left - 2, 1), BOTTOM - top, kind=kind, title=hint))
    if limit is not None and limit <= across.ticks[-1]:
        x = axes.x(limit)
        is_left = x < LEFT + LABEL_PIXELS
        parts.append(line(x, TOP, x, BOTTOM, kind="zero"))
        parts.append(text(x + (6 if is_left else -6), 46, f"limit {limit:,}", anchor="start" if is_left else "end"))
    return picture(WIDTH, HEIGHT, parts, title="Rows by length", wide=True)


def _whole(value: float) -> str:
    return f"{value:,.0f}"
