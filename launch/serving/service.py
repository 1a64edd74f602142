"""A model behind its addresses: what each of them does."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np
from PIL import Image
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from launch.serving import asked, told
from launch.serving.abilities import Abilities
from launch.serving.desk import Busy, Desk, Job
from launch.serving.intake import Intake
from launch.serving.limits import Limits
from launch.serving.metrics import CONTENT_TYPE, Metrics
from launch.serving.pictures import NoPicture, mask, original, png, seen
from launch.serving.refusals import Refusal, busy
from launch.serving.shelf import Collection, Shelf, check_name, named
from launch.serving.stream import events
from training.data.tasks.match import match_question
from training.painting import Region
from training.prompts import cleaned_text
from training.trained import M6
from training.writing import Prompted, prompted

T = TypeVar("T")


class Service:
    """A model behind its addresses."""

    def __init__(self, m: M6, name: str, shelf: Shelf, limits: Limits, abilities: Abilities):
        self.m, self.name, self.shelf, self.limits, self.abilities = m, name, shelf, limits, abilities
        self.metrics = Metrics()
        self.desk, self.intake = Desk(limits, self.metrics), Intake(limits)
        self._decoders = asyncio.Semaphore(limits.decoders)

    def catch_up(self) -> None:
        """Index what a server before did not come to, or another model has."""
        for collection in self.shelf if not self.abilities.why_not["search"] else ():
            if collection.indexed < len(collection.ids()):
                with contextlib.suppress(Refusal):  # more of them than may wait: they are with the next pictures
                    self._submit("index", collection.update)

    # ---- what the model does

    async def caption(self, request: Request, said: asked.ForCaption) -> told.Captions:
        """What pictures show: a name in Chinese or English, or key words."""
        self.abilities.check("caption")
        patches = await self._patches(*said.images)
        job = self._submit("caption", (patches, said.kind), len(patches), said.kind)
        return told.Captions(captions=await self._answer(job))

    async def ask(self, request: Request, said: asked.ForAnswer) -> told.Answer:
        """An answer, about a picture or not; one of the choices, if there are any."""
        self.abilities.check("ask")
        self.m.prompts.tokens(said.question, fine=True)  # what is refused of it must not fail those beside it
        choices = tuple(said.choices)
        if choices:
            self.m.among(choices)
        patches = await self._patches(said.image) if said.image is not None else [None]
        job = self._submit("ask", (said.question, patches[0], choices), key=choices)
        return told.Answer(answer=await self._answer(job))

    async def match(self, request: Request, said: asked.ForMatch) -> told.Match:
        """How likely a text belongs to a picture."""
        self.abilities.check("match")
        self.m.prompts.tokens(match_question(cleaned_text(said.text)), fine=True)
        [patches] = await self._patches(said.image)
        job = self._submit("match", (patches, said.text))
        return told.Match(probability=await self._answer(job))

    async def write(self, request: Request, said: asked.ForText) -> told.Written | Response:
        """A text for a prompt; with `stream`, server-sent events: `piece`s as they come, then `done` or `error`."""
        row = prompted(self.m, said.prompt, said.style, said.examples)
        if said.stream:
            return self._streamed(row)
        text, tokens = await self._answer(self._submit("write", row))
        return told.Written(text=text, tokens=tokens)

    async def draw(self, request: Request, said: asked.ForDrawing) -> told.Drawn:
        """Drawings for a text, the best first."""
        self.abilities.check("draw")
        reference = await self._seen(said.reference) if said.reference is not None else None
        return await self._drawn(self._submit("draw", (said.text, said.hand, reference)))

    async def edit(self, request: Request, said: asked.ForEdit) -> told.Drawn:
        """A picture with a region redrawn, the best first; all else of it stays as it is."""
        self.abilities.check("edit")
        image = await self._decoded(original, said.image, self.limits.edited)
        region: Region | None = said.region
        if said.mask is not None:
            region = await self._decoded(mask, said.mask, self.limits.edited)
        reference = await self._seen(said.reference) if said.reference is not None else None
        return await self._drawn(self._submit("edit", (image, said.text, region, reference, said.hand)))

    # ---- collections

    async def collections(self, request: Request) -> told.Collections:
        """All collections of pictures."""
        every = [await asyncio.to_thread(_stand, one) for one in self.shelf]
        return told.Collections(collections=[told.Collection(**one) for one in every])

    async def collection(self, request: Request) -> told.Listed:
        """A collection, and its pictures' ids."""
        collection = self.shelf.get(request.path_params["name"])
        return told.Listed(**await asyncio.to_thread(_stand, collection), ids=await asyncio.to_thread(collection.ids))

    async def add(self, request: Request, said: asked.ForCollection) -> told.Added:
        """Put pictures into a collection, which is made if there is none of the name, to be found from then on."""
        self.abilities.check("search")
        name = check_name(request.path_params["name"])
        files = [await asyncio.to_thread(named, await self._seen(data)) for data in said.images]

        def take(m: M6) -> dict[str, Any]:
            return _stand(self.shelf.add(m, name, dict(files)))

        # Whoever leaves meanwhile leaves his pictures: they are put in all the same.
        stand = await self._answer(self._submit("index", take), given_up=False)
        return told.Added(**stand, ids=[one for one, _ in files])

    async def delete(self, request: Request) -> Response:
        """Remove a collection and its pictures."""
        name = self.shelf.get(request.path_params["name"]).name
        await self._answer(self._submit("index", lambda _: self.shelf.delete(name)), given_up=False)
        return Response(status_code=204)

    async def search(self, request: Request, said: asked.ForSearch) -> told.Hits:
        """The pictures of a collection that fit a query best."""
        self.abilities.check("search")
        collection = self.shelf.get(request.path_params["name"])
        self.m.prompts.tokens(said.query, fine=True)
        found = await self._answer(self._submit("search", (collection, said.query, said.k)))
        base = f"v1/collections/{quote(collection.name)}/pictures"
        hits = [
            told.Hit(id=hit.path.stem, score=hit.score, details=hit.details, href=f"{base}/{hit.path.stem}")
            for hit in found
        ]
        return told.Hits(hits=hits, indexed=collection.indexed)

    async def picture(self, request: Request) -> Response:
        """A picture of a collection, as PNG, at most 512 px a side."""
        collection = self.shelf.get(request.path_params["name"])
        content = await asyncio.to_thread(collection.picture, request.path_params["id"])
        if content is None:
            raise Refusal(404, "no_picture", "there is no picture of this id")
        return Response(content, media_type="image/png", headers={"cache-control": "private, max-age=3600"})

    # ---- about the server

    async def model(self, request: Request) -> told.Model:
        """The model, what it can do, and what a request may be."""
        tasks = {task: told.Ability(able=not why, why=why) for task, why in self.abilities.why_not.items()}
        parameters = sum(weight.numel() for weight in self.m.network.parameters())
        return told.Model(
            model=self.name, step=self.m.step, parameters=parameters, tasks=tasks, limits=_shown(self.limits)
        )

    async def health(self, request: Request) -> told.Health:
        """Whether requests are answered."""
        return told.Health(status="ready", model=self.name, step=self.m.step)

    async def counted(self, request: Request) -> Response:
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})

    # ---- below: how

    async def _patches(self, *files: bytes) -> Sequence[np.ndarray]:
        """What the model sees of pictures: made while it computes for those who came before. Raises Refusal."""

        def patches(data: bytes, pixels: int) -> np.ndarray:
            return self.m.prompts.patches([seen(data, pixels)])[0]

        try:
            with self.desk.expecting(len(files)):
                return [await self._decoded(patches, data, self.limits.pixels) for data in files]
        except Busy:
            raise busy() from None

    async def _seen(self, data: bytes) -> Image.Image:
        return await self._decoded(seen, data, self.limits.pixels)

    async def _decoded(self, decode: Callable[[bytes, int], T], data: bytes, pixels: int) -> T:
        async with self._decoders:
            try:
                return await asyncio.to_thread(decode, data, pixels)
            except NoPicture as error:
                raise Refusal(422, "picture", f"the picture: {error}") from None

    def _submit(self, task: str, what: Any, rows: int = 1, key: Any = None, tell: Any = None) -> Job:
        try:
            return self.desk.submit(task, what, rows, key, tell)
        except Busy:
            raise busy() from None

    async def _answer(self, job: Job, given_up: bool = True) -> Any:
        """Of a job, which is `given_up` where nobody waits for it any more."""
        try:
            return await job.answer
        finally:
            job.gone = given_up

    async def _drawn(self, job: Job) -> told.Drawn:
        pictures = await self._answer(job)
        files = [await asyncio.to_thread(png, picture) for picture in pictures]
        return told.Drawn(pictures=[base64.b64encode(file).decode() for file in files])

    def _streamed(self, row: Prompted) -> Response:
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        job = self._submit("write", row, tell=pieces.put_nowait)
        job.answer.add_done_callback(lambda _: pieces.put_nowait(None))
        return StreamingResponse(
            events(job, pieces, self.limits), media_type="text/event-stream", headers={"x-accel-buffering": "no"}
        )


def _stand(collection: Collection) -> dict[str, Any]:
    return {"name": collection.name, "pictures": len(collection.ids()), "indexed": collection.indexed}


def _shown(limits: Limits) -> dict[str, float]:
    names = ("bytes", "pictures", "pixels", "edited", "text", "seconds", "collected")
    return {name: getattr(limits, name) for name in names}
