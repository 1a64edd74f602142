"""A request's body, read within bounds of size and time, and what it says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from launch.serving.asked import Asked
from launch.serving.limits import Limits
from launch.serving.refusals import Refusal, busy, left
from training.recipe import one_line

A = TypeVar("A", bound=Asked)


class Intake:
    """Of all requests: what they hold in memory together is bounded, too."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.held = 0  # bytes

    @asynccontextmanager
    async def read(self, request: Request, kind: type[A]) -> AsyncIterator[A]:
        """What a request says, held until it is answered. Raises Refusal."""
        body = bytearray()
        try:
            await self._receive(request, body)
            yield await self._understood(request, body, kind)
        finally:
            self.held -= len(body)

    async def _receive(self, request: Request, body: bytearray) -> None:
        try:
            async with asyncio.timeout(self.limits.body):
                async for chunk in request.stream():
                    if len(body) + len(chunk) > self.limits.bytes:
                        raise too_large(self.limits)
                    if self.held + len(chunk) > self.limits.held:
                        raise busy()
                    body += chunk
                    self.held += len(chunk)
        except TimeoutError:
            slow = f"the request did not come within {self.limits.body:g} seconds"
            raise Refusal(408, "slow", slow, {"connection": "close"}) from None
        except ClientDisconnect:
            raise left() from None

    async def _understood(self, request: Request, body: bytearray, kind: type[A]) -> A:
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        try:
            if media == "application/json":
                if body.count(b",") > self.limits.commas:
                    raise Refusal(413, "large", "the JSON has more values than any request needs")
                return await asyncio.to_thread(kind.model_validate_json, bytes(body))
            if media == "multipart/form-data":
                return kind.model_validate(await self._fields(request, body, kind))
        except ValidationError as error:
            raise Refusal(422, "invalid", _problem(error)) from None
        raise Refusal(415, "media", "the request must be application/json or multipart/form-data")

    async def _fields(self, request: Request, body: bytearray, kind: type[Asked]) -> dict[str, object]:
        async def whole() -> AsyncGenerator[bytes, None]:
            yield bytes(body)

        fields = self.limits.fields
        parser = MultiPartParser(
            request.headers, whole(), max_files=fields, max_fields=fields, max_part_size=self.limits.bytes
        )
        parser.spool_max_size = self.limits.bytes  # nothing goes to a disk
        try:
            form = await parser.parse()
        except MultiPartException as error:
            raise Refusal(400, "form", one_line(error.message)[:200]) from None
        except (KeyError, ValueError, LookupError, UnicodeError):
            raise Refusal(400, "form", "not a readable form") from None
        found: dict[str, object] = {}
        for name in form:
            values = [await one.read() if isinstance(one, UploadFile) else one for one in form.getlist(name)]
            if len(values) > 1 and name not in kind.several:
                raise Refusal(422, "invalid", f"{name[:40]!a} is given more than once")
            found[name] = values if name in kind.several else values[0]
        return found


def too_large(limits: Limits) -> Refusal:
    return Refusal(413, "large", f"more than {limits.bytes:,} bytes: send less at once, or smaller pictures")


def _problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part)[:40] for part in first["loc"])
    return f"{place or 'the request'}: {one_line(first['msg'])}"[:300]
