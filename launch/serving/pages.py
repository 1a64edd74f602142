"""The one web page: three files that are served as they are."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).parent / "page"
FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}

Page = Callable[[Request], Awaitable[Response]]


def pages() -> dict[str, Page]:
    """By address."""
    return {path: _page((FOLDER / name).read_bytes(), media) for path, (name, media) in FILES.items()}


def _page(content: bytes, media: str) -> Page:
    async def page(_: Request) -> Response:
        return Response(content, media_type=media, headers={"cache-control": "no-cache"})

    return page
