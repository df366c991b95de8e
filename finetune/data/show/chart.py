"""A histogram as an inline picture."""

from typing import Any

WIDTH, HEIGHT, MARGIN, FOOT = 940, 210, 46, 30


def histogram(lengths: dict[str, Any], *, limit: int) -> str:
    """Rows by tokens, with the limit where it lies inside the picture."""
    edges, rows = lengths["histogram"]["edges"], lengths["histogram"]["rows"]
    if not rows:
        return ""
    tallest, longest = max(rows), edges[-1]
    wide, high = WIDTH - 2 * MARGIN, HEIGHT - FOOT - 14

    def x(tokens: float) -> float:
        return MARGIN + wide * tokens / longest

    bars = "".join(
        f'<rect x="{x(start) + 1:.1f}" y="{14 + high * (1 - count / tallest):.1f}" width="{max(x(end) - x(start) - 2, 1):.1f}" '
        f'height="{high * count / tallest:.1f}"><title>{start:,.0f} to {end:,.0f} tokens: {count:,} rows</title></rect>'
        for start, end, count in zip(edges, edges[1:], rows, strict=False)
    )
    ticks = "".join(
        _text(x(longest * part / 4), HEIGHT - 10, f"{longest * part / 4:,.0f}{' tokens' if part == 4 else ''}", anchor="middle")
        for part in range(5)
    )
    line = ""
    if limit < longest:
        line = f'<line x1="{x(limit):.1f}" x2="{x(limit):.1f}" y1="4" y2="{HEIGHT - FOOT}"/>'
        line += _text(x(limit) + 4, 14, f"limit {limit:,}", anchor="start")
    scale = _text(MARGIN - 6, 20, f"{tallest:,}", anchor="end") + _text(MARGIN - 6, HEIGHT - FOOT, "0", anchor="end")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="rows by length">{bars}{ticks}{scale}{line}</svg>'


def _text(x: float, y: float, words: str, *, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'
