"""Connections that are cut off in bounded time when a client is too slow to ask, or to take what it asked for.

uvicorn has a time limit for idle connections alone: one byte a minute would keep a connection for ever.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from launch.serving.limits import Limits

LOOK = 0.5  # s between two looks at a connection


class BoundedProtocol(H11Protocol):
    limits = Limits()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            transport.abort()
            return
        self._asked = self._taken = self.loop.time()  # when nothing was left to ask, and to take
        self._timer = self.loop.call_later(LOOK, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        if timer := getattr(self, "_timer", None):
            timer.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        now = self.loop.time()
        if not self._asking():
            self._asked = now
        if not self.transport.get_write_buffer_size():
            self._taken = now
        if now - self._asked > self.limits.head or now - self._taken > self.limits.sending:
            self.transport.abort()
        else:
            self._timer = self.loop.call_later(LOOK, self._look)

    def _asking(self) -> bool:
        """Whether a request's head is still to come, or the rest of a body that was refused."""
        theirs, ours = self.conn.their_state, self.conn.our_state
        if theirs is h11.IDLE:
            return self.cycle is None or bool(self.conn.trailing_data[0])
        return theirs is h11.SEND_BODY and ours in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED)


def bounded(limits: Limits) -> type[BoundedProtocol]:
    """The protocol within these limits."""
    fields: dict[str, Any] = {"limits": limits}
    return type("BoundedProtocol", (BoundedProtocol,), fields)
