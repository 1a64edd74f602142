"""What a request is answered that is not done: a status, a word for programs, and a line for people."""

from __future__ import annotations

import json
from collections.abc import Mapping

from starlette.responses import Response

from launch.serving.limits import Limits

RETRY_AFTER = "2"  # s


class Refusal(Exception):
    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, dict(headers or {})

    def response(self) -> Response:
        content = json.dumps({"error": {"code": self.code, "message": self.message}}, ensure_ascii=False)
        return Response(content, self.status, self.headers, "application/json")


def busy() -> Refusal:
    return Refusal(503, "busy", "too many requests wait already: try again soon", {"retry-after": RETRY_AFTER})


def no_room() -> Refusal:
    return Refusal(507, "full", "the server's disk has no more room: delete what is not needed")


def left() -> Refusal:
    """For the books alone: nobody is there to read it."""
    return Refusal(499, "left", "the client left")


def too_late(limits: Limits) -> Refusal:
    return Refusal(504, "late", f"it was not done within {limits.seconds:g} seconds: ask for less, or try again later")
