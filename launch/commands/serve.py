"""The verb that puts a trained run behind HTTP."""

from pathlib import Path
from typing import Any

import click

from launch.commands.options import DATA, PATH


class Memory(click.ParamType[dict[int | str, str]]):
    """cpu=20GB,0=70GB: by device, a GPU's number or cpu."""

    name = "memory"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[int | str, str]:
        if isinstance(value, dict):
            return value
        pairs = dict(part.partition("=")[::2] for part in value.split(","))
        if not all((name == "cpu" or name.isdecimal()) and size for name, size in pairs.items()):
            self.fail(f"{value!r} must be such as cpu=20GB,0=70GB", param, ctx)
        return {int(name) if name.isdecimal() else name: size for name, size in pairs.items()}


@click.command()
@click.argument("run", required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="Where others can reach it, it takes a token.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option("--token-file", type=PATH, help="A file with the access token; else that of M6_TOKEN, if it is set.")
@click.option("--store", type=PATH, help="Where collections of pictures are kept; runs/.served if not given.")
@click.option("--rows", type=click.IntRange(1, 256), default=32, show_default=True, help="Read by the model at once.")
@click.option("--queue", type=click.IntRange(1), default=128, show_default=True, help="Rows that may wait for it.")
@click.option("--seconds", type=click.FloatRange(1), default=60, show_default=True, help="That a request may take.")
@click.option("--max-memory", type=Memory(), help="Of an export, in memory; the rest is read from the disk: cpu=20GB")
@DATA
def serve(
    run: str | None,
    host: str,
    port: int,
    token_file: Path | None,
    store: Path | None,
    rows: int,
    queue: int,
    seconds: float,
    max_memory: dict[int | str, str] | None,
    data: Path | None,
) -> None:
    """Serve RUN (a name under runs/, a run's or an export's folder; the run that saved last) as a web page and as JSON.

    SIGTERM or Ctrl-C ends it once what runs is done; a second Ctrl-C at once.
    """
    from launch.serve import STORE
    from launch.serve import serve as start
    from launch.serving.limits import Limits

    limits = Limits(rows=rows, queue=queue, seconds=seconds)
    start(run, data, host, port, token_file, store or STORE, limits, max_memory)
