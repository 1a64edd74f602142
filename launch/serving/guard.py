"""What every request must pass before anything of it is read, and what every answer carries."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launch.serving.intake import too_large
from launch.serving.limits import Limits
from launch.serving.metrics import Metrics
from launch.serving.refusals import Refusal, busy

OWN = ("localhost", "127.0.0.1", "[::1]")
CARRIED = {
    "x-content-type-options": "nosniff",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "x-frame-options": "DENY",
}


class Guard:
    """`full`: whether no more requests of the model are taken. `token`: what the API is called with, if any.

    Without a token only pages of this very server may call it, under one of `hosts`: a page from elsewhere, which its
    visitor's browser shows, could else use a server that listens on loopback.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        metrics: Metrics,
        full: Callable[[], bool],
        token: str | None,
        hosts: frozenset[str],
    ):
        self.app, self.limits, self.metrics, self.full = app, limits, metrics, full
        self.token, self.hosts = token, hosts
        self.clients = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.monotonic(), 499  # of a client that left

        async def send_more(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in CARRIED.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        self.clients += 1
        try:
            self._check(scope["method"], scope["path"], Headers(scope=scope))
            await self.app(scope, receive, send_more)
        except Refusal as refusal:
            await refusal.response()(scope, receive, send_more)
        finally:
            self.clients -= 1
            self.metrics.request(task_of(scope["method"], scope["path"]), status, time.monotonic() - start)

    def _check(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        """Raises Refusal."""
        if sum(len(name) + len(value) for name, value in headers.items()) > self.limits.heads:
            raise Refusal(431, "head", f"the request's head has more than {self.limits.heads:,} characters")
        host = headers.get("host", "")
        if self.token is None and host and _name(host) not in self.hosts:
            raise Refusal(403, "host", "this server is not called by that name; with a token it may be")
        if (origin := headers.get("origin")) and origin.partition("://")[2] != host:
            raise Refusal(403, "origin", "pages of other servers may not call this one")
        if path.startswith(("/v1/", "/metrics")) and not self._known(headers.get("authorization", "")):
            raise Refusal(
                401, "token", "give the access token: Authorization: Bearer …", {"www-authenticate": "Bearer"}
            )
        if self.clients > self.limits.clients or (method == "POST" and self.full()):
            raise busy()
        if (length := headers.get("content-length", "0")).isdigit() and int(length) > self.limits.bytes:
            raise too_large(self.limits)

    def _known(self, authorization: str) -> bool:
        if self.token is None:
            return True
        kind, _, given = authorization.partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.token.encode())


def _name(host: str) -> str:
    """Without the port."""
    return host.rpartition(":")[0].lower() if host.rpartition(":")[2].isdigit() else host.lower()


TASKS = ("caption", "ask", "match", "write", "draw", "edit", "model")


def task_of(method: str, path: str) -> str:
    """What a request is counted as: of few kinds, whatever is asked for."""
    parts = path.strip("/").split("/")
    if parts[0] != "v1":
        return parts[0] if parts[0] in ("health", "metrics") and len(parts) == 1 else "page"
    if parts[1:2] == ["collections"]:
        return "search" if parts[-1] == "search" and method == "POST" else "collections"
    return parts[1] if len(parts) == 2 and parts[1] in TASKS else "other"
