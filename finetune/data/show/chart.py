"""A histogram as an inline picture."""

from typing import Any

from finetune.data.show.summary import format_rows

WIDTH, HEIGHT, MARGIN, FOOT, TOP = 940, 210, 46, 30, 18
RIGHT = 0.8
"""A limit further right than this share of the picture has its name on its left."""


def histogram(lengths: dict[str, Any], *, limit: int) -> str:
    """Rows by tokens, with the limit where it lies inside the picture; what is longer has a colour of its own."""
    edges, rows = lengths["histogram"]["edges"], lengths["histogram"]["rows"]
    if not rows:
        return ""
    tallest, longest = max(rows), edges[-1]
    wide, high = WIDTH - 2 * MARGIN, HEIGHT - FOOT - TOP

    def x(tokens: float) -> float:
        return MARGIN + wide * tokens / longest

    bars = ""
    for start, end, count in zip(edges, edges[1:], rows, strict=False):
        tall, wide_bar = high * count / tallest, max(x(end) - x(start) - 2, 1)
        kind = ' class="long"' if start >= limit else ""
        bars += (
            f'<rect{kind} x="{x(start) + 1:.1f}" y="{TOP + high - tall:.1f}" width="{wide_bar:.1f}" height="{tall:.1f}">'
            f"<title>{start:,.0f} to {end:,.0f} tokens: {format_rows(count)}</title></rect>"
        )
    more = " or more" if longest < lengths["longest"] else ""
    ticks = "".join(
        _text(x(longest * part / 4), HEIGHT - 10, f"{longest * part / 4:,.0f}", anchor="middle") for part in range(4)
    )
    ticks += _text(WIDTH - 6, HEIGHT - 10, f"{longest:,.0f} tokens{more}", anchor="end")
    line = ""
    if limit < longest:
        left = limit > longest * RIGHT
        line = f'<line x1="{x(limit):.1f}" x2="{x(limit):.1f}" y1="{TOP - 4}" y2="{HEIGHT - FOOT}"/>'
        line += _text(x(limit) + (-4 if left else 4), TOP + 10, f"limit {limit:,}", anchor="end" if left else "start")
    scale = _text(6, 12, format_rows(tallest), anchor="start") + _text(MARGIN - 6, HEIGHT - FOOT, "0", anchor="end")
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="rows by length">{bars}{ticks}{scale}{line}</svg>'
    )


def _text(x: float, y: float, words: str, *, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'
