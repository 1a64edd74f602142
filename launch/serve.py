"""`m6 serve`: a trained run behind HTTP, until it is asked to end."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

import uvicorn

from launch.serving.abilities import Abilities
from launch.serving.app import application
from launch.serving.connections import bounded
from launch.serving.limits import Limits
from launch.serving.service import Service
from launch.serving.shelf import Shelf
from launch.use import chosen
from training.errors import UserError
from training.run import FOLDER, home_of
from training.trained import M6

STORE = FOLDER / ".served"
TOKEN = "M6_TOKEN"  # of the environment
LEAST_TOKEN = 16  # characters
SPARE_FILES = 256  # handles beside those of connections


def serve(
    run: str | None,
    data: Path | None,
    host: str,
    port: int,
    token_file: Path | None,
    store: Path,
    limits: Limits,
    max_memory: Mapping[int | str, str] | None,
) -> None:
    """Answer requests at HOST:PORT until SIGTERM or Ctrl-C; what runs then is finished. Raises UserError."""
    token = read_token(token_file)
    if token is None and not is_loopback(host):
        way = f"name one by --token-file or {TOKEN}, or leave --host"
        raise UserError(f"--host {host}: others can reach it, so it takes an access token: {way}")
    listener = listening(host, port)  # before a model is loaded for nothing
    run = chosen(run)
    m = M6.load(run, data=data, max_memory=max_memory)
    abilities = Abilities(m)
    shelf = Shelf(store, "" if abilities.why_not["search"] else m.identity, limits)
    service = Service(m, home_of(run).absolute().name, shelf, limits, abilities)
    _allow_files(limits.connections + SPARE_FILES)
    for name in ("uvicorn.error", "python_multipart"):
        logging.getLogger(name).setLevel(logging.ERROR)  # a malformed request is no news
    server = server_of(service, token, host)
    # uvicorn ends in order, and then raises the signal again: it has been heeded.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    listener.listen()  # from now on nobody is turned away
    address = f"http://{_shown(host)}:{listener.getsockname()[1]}/"
    print(f"serving {service.name}, step {m.step}, at {address} (Ctrl-C ends)", file=sys.stderr, flush=True)
    server.run(sockets=[listener])


def server_of(service: Service, token: str | None, host: str) -> uvicorn.Server:
    limits = service.limits
    config = uvicorn.Config(
        application(service, token, _shown(host)),
        http=bounded(limits), ws="none", lifespan="on", log_config=None, access_log=False, server_header=False,
        proxy_headers=False, timeout_keep_alive=limits.idle, timeout_graceful_shutdown=round(limits.seconds) + 1,
    )  # fmt: skip
    return uvicorn.Server(config)


def read_token(file: Path | None) -> str | None:
    """Of a file's first line, or of the environment; None if there is none. Raises UserError."""
    where, token = f"--token-file {file}" if file else TOKEN, os.environ.get(TOKEN)
    if file:
        try:
            token = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{where}: cannot be read ({getattr(error, 'strerror', None) or 'no text'})") from None
    if token is None:
        return None
    if len(token) < LEAST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        way = "head -c 24 /dev/urandom | base64 makes one"
        raise UserError(f"{where}: a token has at least {LEAST_TOKEN} letters, digits or signs, and no blank: {way}")
    return token


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def _shown(host: str) -> str:
    """As it stands in an address."""
    return f"[{host}]" if ":" in host else host


def listening(host: str, port: int) -> socket.socket:
    """A socket of this address. Raises UserError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: cannot be listened at ({error.strerror or error})") from None
    return listener


def _allow_files(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
