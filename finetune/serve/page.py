"""The page at ``/``: two models next to each other. Three files of this package, and nothing from the network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response

FOLDER = Path(__file__).parent / "static"
FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
"""File and type by path. None of them needs the key, which the page asks for."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The browser refuses every request to another server, and every script that is not this page's own."""

MOST_SAMPLES = 50


def add_page(app: FastAPI, samples: Sequence[dict[str, Any]]) -> None:
    """Adds the page, and the held-out samples that it shows.

    Args:
        app: The server.
        samples: ``messages`` and ``reference`` each.
    """
    for path, (name, kind) in FILES.items():
        app.add_api_route(path, _file(name, kind), methods=["GET"], response_model=None)
    app.add_api_route("/samples", lambda: list(samples), methods=["GET"], response_model=None)


def read_samples(target: Path) -> list[dict[str, Any]]:
    """Returns the first held-out chats of a run with their expected answers; none where the folder holds no run."""
    heldout = target / "data" / "heldout"
    if not heldout.is_dir():
        return []
    from datasets import load_from_disk

    split = load_from_disk(str(heldout))
    if "chat" not in split.column_names:  # prepared by an earlier version
        return []
    rows = [split[number] for number in range(min(len(split), MOST_SAMPLES))]
    return [
        {"messages": json.loads(row["chat"])["messages"], "reference": row["reference"]} for row in rows if row["chat"]
    ]


def _file(name: str, kind: str) -> Any:
    def serve_file() -> Response:
        headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
        return Response((FOLDER / name).read_bytes(), media_type=f"{kind}; charset=utf-8", headers=headers)

    return serve_file
