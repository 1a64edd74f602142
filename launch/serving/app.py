"""The addresses of a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from launch.serving import asked, told
from launch.serving.guard import OWN, Guard
from launch.serving.limits import Limits
from launch.serving.openapi import Address, described
from launch.serving.pages import pages
from launch.serving.refusals import Refusal, left, no_room, too_late
from launch.serving.service import Service
from launch.serving.works import open_lanes
from training.errors import UserError
from training.files import NO_ROOM

T = TypeVar("T")


def addresses(service: Service) -> list[Address]:
    one = "/v1/collections/{name}"
    return [
        Address("POST", "/v1/caption", service.caption, asked.ForCaption, told.Captions),
        Address("POST", "/v1/ask", service.ask, asked.ForAnswer, told.Answer),
        Address("POST", "/v1/match", service.match, asked.ForMatch, told.Match),
        Address("POST", "/v1/write", service.write, asked.ForText, told.Written),
        Address("POST", "/v1/draw", service.draw, asked.ForDrawing, told.Drawn),
        Address("POST", "/v1/edit", service.edit, asked.ForEdit, told.Drawn),
        Address("GET", "/v1/collections", service.collections, None, told.Collections),
        Address("GET", one, service.collection, None, told.Listed),
        Address("POST", one, service.add, asked.ForCollection, told.Added),
        Address("DELETE", one, service.delete, None, None),
        Address("POST", f"{one}/search", service.search, asked.ForSearch, told.Hits),
        Address("GET", f"{one}/pictures/{{id}}", service.picture, None, None),
        Address("GET", "/v1/model", service.model, None, told.Model),
        Address("GET", "/health", service.health, None, told.Health),
    ]


def application(service: Service, token: str | None, host: str) -> ASGIApp:
    """All of a server, as an ASGI application."""
    table = addresses(service)
    document = described(table)

    async def openapi(_: Request) -> Response:
        return JSONResponse(document)

    @asynccontextmanager
    async def working(_: Starlette) -> AsyncIterator[None]:
        open_lanes(service.desk, service.m, service.limits.rows)
        service.catch_up()
        yield
        await asyncio.to_thread(service.desk.close)

    routes = [
        *(Route(one.path, partial(_answer, service, one), methods=[one.method]) for one in table),
        Route("/metrics", service.counted),
        Route("/openapi.json", openapi),
        *(Route(path, page) for path, page in pages().items()),
    ]
    app = Starlette(
        routes=routes,
        lifespan=working,
        exception_handlers={
            Refusal: _refused,
            UserError: _mistake,
            HTTPException: _http,
            OSError: _disk,
            Exception: _fault,
        },
    )
    desk, limits = service.desk, service.limits
    guard = Guard(app, limits, service.metrics, lambda: desk.full, token, frozenset({*OWN, host}))
    service.metrics.watch(lambda: desk.waiting + desk.expected, lambda: guard.clients)
    return guard


async def _answer(service: Service, address: Address, request: Request) -> Response:
    if address.asked is None:
        answer = await _awaited(request, address.act(request), service.limits)
    else:
        async with service.intake.read(request, address.asked) as said:
            answer = await _awaited(request, address.act(request, said), service.limits)
    if isinstance(answer, BaseModel):
        return Response(answer.model_dump_json(), media_type="application/json")
    return answer


async def _awaited(request: Request, work: Awaitable[T], limits: Limits) -> T:
    """What comes of work, which ends with its time, or when its client leaves. Raises Refusal."""
    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_leaving(request))
    try:
        await asyncio.wait((doing, leaving), timeout=limits.seconds, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise left() if leaving.done() else too_late(limits)
    finally:
        doing.cancel()
        leaving.cancel()


async def _leaving(request: Request) -> None:
    """Until its client leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error.response()


async def _mistake(_: Request, error: Exception) -> Response:
    return Refusal(422, "mistake", str(error)).response()


async def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "no_address", 405: "method"}.get(error.status_code, "http")
    return Refusal(error.status_code, code, error.detail, error.headers).response()


async def _disk(request: Request, error: Exception) -> Response:
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return no_room().response()
    raise error


async def _fault(_: Request, error: Exception) -> Response:
    return Refusal(500, "fault", "a fault of the server: its log has more").response()
