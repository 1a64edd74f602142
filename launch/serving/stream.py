"""A text as server-sent events, while it is written."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator

from launch.serving.desk import Job
from launch.serving.limits import Limits
from launch.serving.refusals import too_late


async def events(job: Job, pieces: asyncio.Queue[str | None], limits: Limits) -> AsyncIterator[str]:
    """`piece` with each piece's text, then `done` with the whole, or `error`. The last of `pieces` is None."""
    try:
        async with asyncio.timeout(job.left(limits.seconds)):
            while (piece := await pieces.get()) is not None:
                yield _event("piece", {"text": piece})
            text, tokens = job.answer.result()
        yield _event("done", {"text": text, "tokens": tokens})
    except TimeoutError:
        late = too_late(limits)
        yield _event("error", {"code": late.code, "message": late.message})
    except Exception:
        logging.getLogger("m6").exception("a text")
        yield _event("error", {"code": "fault", "message": "a fault of the server: its log has more"})
    finally:
        job.gone = True


def _event(name: str, content: dict[str, object]) -> str:
    return f"event: {name}\ndata: {json.dumps(content, ensure_ascii=False)}\n\n"
