"""Requests that mean no good: each is to be answered with 4xx, or not at all."""

from __future__ import annotations

import base64
import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from tests.launch.serving.served import form

PHOTO = Image.effect_noise((64, 48), 80).convert("RGB")
KINDS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True)
class Case:
    name: str
    path: str = "/v1/caption"
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    method: str = "POST"
    raw: bytes | None = None  # what is sent instead of all that


def encoded(kind: str, image: Image.Image = PHOTO, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format=kind, **options)
    return out.getvalue()


def cases() -> Iterator[Case]:
    yield from (_upload(name, data, number) for number, (name, data) in enumerate(_pictures()))
    yield from _paths()
    yield from _parameters()
    yield from _bodies()
    yield from _requests()


def _upload(name: str, data: bytes, number: int) -> Case:
    """To each place that takes pictures in turn, under a name and a type that lie."""
    path, field_name, more = (
        ("/v1/caption", "images", []),
        ("/v1/collections/hostile", "images", []),
        ("/v1/edit", "image", [("region", "1,1,9,9")]),
        ("/v1/ask", "image", [("question", "这是什么?")]),
    )[number % 4]
    names = ["../../../../tmp/evil.png", "x.png"]
    body, kind = form([(field_name, data), *more], names)
    return Case(f"upload of {name}", path, body, {"Content-Type": kind})


def _pictures() -> Iterator[tuple[str, bytes]]:
    for kind in KINDS:
        whole = encoded(kind)
        for share in (0.01, 0.1, 0.3, 0.5, 0.8, 0.95, 0.999):
            yield f"{kind} cut at {share}", whole[: int(len(whole) * share)]
        for number, behind in enumerate(_payloads()):
            yield f"{kind} with payload {number} behind it", whole + behind
        yield f"{kind} within garbage", b"\0\xff" * 40 + whole
        yield f"{kind} of noise after its head", whole[:40] + Image.effect_noise((64, 48), 80).tobytes()
    for number, data in enumerate(_others()):
        yield f"no picture {number}", data
    frames = [Image.effect_noise((32, 32), noise).convert("RGB") for noise in (9, 50, 90)]
    for kind in ("PNG", "WEBP", "GIF"):
        yield f"animated {kind}", encoded(kind, frames[0], save_all=True, append_images=frames[1:])
    for side in (6000, 60_000, 2**31 - 1):
        yield f"PNG that says it has {side} px a side", _png(side, zlib.compress(bytes(10**6), 9))
    yield "PNG of no size", _png(0, zlib.compress(b""))
    yield "PNG whose data are no data", _png(32, b"no zlib")
    yield "PNG of too few data", _png(512, zlib.compress(b"\0" * 99))
    yield "JPEG that says it has 65535 px a side", _resized_jpeg(65535)
    yield "JPEG of no size", _resized_jpeg(0)
    yield "JPEG whose last scan comes thousands of times", scanned(4800, 3000)
    yield "WebP that says it is longer", b"RIFF\xff\xff\xff\x7fWEBP" + encoded("WEBP")[12:]
    yield (
        "PNG of 100 MB of text",
        _png(32, zlib.compress(bytes(3200)), _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))),
    )


def scanned(side: int, times: int) -> bytes:
    """A small JPEG that takes minutes: each scan is a pass over all pixels."""
    data = encoded("JPEG", Image.new("L", (side, side), 128), progressive=True)
    return data[:-2] + data[data.rfind(b"\xff\xda") : -2] * times + data[-2:]


def _payloads() -> Iterator[bytes]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("../../evil.sh", "#!/bin/sh\ntouch /tmp/evil\n")
    yield archive.getvalue()
    yield b"<html><script>fetch('//evil.example')</script></html>"
    yield b"<?php system($_GET['c']); ?>"
    yield b"\x7fELF\x02\x01\x01" + bytes(99)
    yield b"%PDF-1.7\n1 0 obj<</OpenAction 2 0 R>>endobj"
    yield b"=1;alert(1)//"
    yield encoded("PNG")


def _others() -> Iterator[bytes]:
    yield b""
    yield b"\0"
    yield b"no picture"
    for kind in ("GIF", "BMP", "TIFF", "ICO", "PPM", "TGA"):
        yield encoded(kind)
    yield b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>"
    yield b"<!DOCTYPE x [<!ENTITY e SYSTEM 'file:///etc/passwd'>]><svg>&e;</svg>"
    yield b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file"
    yield b"push graphic-context\nimage over 0,0 0,0 'url(file:///etc/passwd)'"
    yield pickle.dumps(Image.Exif)
    yield b"8BPS\0\1" + bytes(40)
    yield b"\x89PNG\r\n\x1a\n"
    yield b"\xff\xd8\xff\xd9"
    yield b"RIFF\4\0\0\0WEBP"


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(side: int, data: bytes, *before: bytes) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *before, _chunk(b"IDAT", data), _chunk(b"IEND", b"")])


def _resized_jpeg(side: int) -> bytes:
    data = bytearray(encoded("JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    return bytes(data)


def _paths() -> Iterator[Case]:
    body, kind = form([("images", encoded("PNG"))])
    names = (
        "..", ".", "%2e%2e", "..%2f..%2fx", "%2fetc%2fpasswd", "%2e%2e%2f%2e%2e%2fetc", "a%2fb", "a%00b", "%00",
        ".hidden", "a.b", "-x", "_x", "con%0d%0aX-Evil:1", "%ff%fe", "x" * 51, "x" * 5000, "a%20b", "%e2%80%ae",
        "%5c%5cserver%5cx", "..%5c..%5cx", "~root", "$(touch%20x)", "%3Cscript%3E", "*", "index/index.safetensors",
    )  # fmt: skip
    for name in names:
        yield Case(f"collection {name[:30]}", f"/v1/collections/{name}", body, {"Content-Type": kind})
    for name in (
        "..%2f..%2findex",
        "%2e%2e%2findex.safetensors",
        "0" * 31,
        "0" * 33,
        "0" * 32,
        "A" * 32,
        "..",
        "%00" * 32,
    ):
        yield Case(f"picture {name[:30]}", f"/v1/collections/kept/pictures/{name}", method="GET")
    for path in (
        "/../../etc/passwd",
        "/page.css/../../../app.py",
        "/static/x",
        "/v1",
        "/v1/collections/none",
        "//etc/passwd",
    ):
        yield Case(f"page {path}", path, method="GET")
    yield Case("deletion of what is above", "/v1/collections/..", method="DELETE")
    yield Case("deletion of a folder elsewhere", "/v1/collections/%2e%2e%2f%2e%2e%2frun", method="DELETE")


def _parameters() -> Iterator[Case]:
    """Requests that would be right but for one field."""
    picture, small = (base64.b64encode(encoded("PNG", one)).decode() for one in (PHOTO, PHOTO.crop((0, 0, 9, 9))))
    right: dict[str, dict[str, Any]] = {
        "write": {"prompt": "写一首诗。"}, "draw": {"text": "圆"}, "edit": {"image": picture, "region": [1, 1, 9, 9]},
        "caption": {"images": [picture]}, "ask": {"question": "圆?"}, "match": {"image": picture, "text": "圆"},
        "collections/kept/search": {"query": "红"}, "collections/none/search": {"query": "红"},
    }  # fmt: skip
    for path, changes in _CHANGES.items():
        for name, values in changes.items():
            for value in values:
                yield _asked(path, right[path] | {name: value})
    for path, asked in (
        *(("write", one) for one in ({}, [], None, "x")), ("ask", {"image": picture}), ("edit", {"image": picture}),
        ("edit", right["edit"] | {"mask": picture}), ("edit", {"image": picture, "mask": small}),
        ("draw", {"text": "圆", "pictures": 9, "tries": 3}), ("caption", {"images": [picture] * 17}),
        ("collections/none/search", {"query": "红"}),
    ):  # fmt: skip
        yield _asked(path, asked)


_CHANGES: dict[str, dict[str, list[Any]]] = {
    "write": {
        "prompt": ["", " \n\t\u200b", 7, None, "很" * 4097, "很长" * 500],
        "tokens": [0, -1, 10**9, 1.5, 10**400, "many"],
        "temperature": [-1, 1e99, "NaN"],
        "top_p": [0, 1.1],
        "repetition_penalty": [0, 1e9],
        "seed": [-1, 2**63],
        "stream": ["perhaps"],
        "examples": [[["a"]], [["a", "b"]] * 99, [["写" * 90, "诗" * 90]]],
        "__proto__": [{}],
        "room": [1],
    },
    "draw": {
        "text": ["红" * 300], "tries": [0, 10**6], "size": [7, 10**6], "steps": [10**6], "guidance": [1e9],
        "reference": ["@@"],
    },
    "edit": {
        "region": [[0, 0, 0, 0], [60, 40, 99, 99], [-5, 0, 9, 9], [2**70, 0, 9, 9], [1, 1, 9], "a,b,c,d"],
    },
    "caption": {"images": [[], ["no base64!"], [None], {"a": 1}], "kind": ["fr"]},
    "ask": {"choices": [[" "], ["红"] * 17], "question": ["圆" * 200]},
    "match": {"text": ["", "红" * 500]},
    "collections/kept/search": {"query": ["", "红" * 4097], "k": [0, 10**9]},
}  # fmt: skip


def _asked(path: str, asked: Any) -> Case:
    return _json(f"{path} of {json.dumps(asked)[:50]}", f"/v1/{path}", json.dumps(asked).encode())


def _json(name: str, path: str, body: bytes) -> Case:
    return Case(name, path, body, {"Content-Type": "application/json"})


def _bodies() -> Iterator[Case]:
    for name, body in {
        "half of JSON": b'{"prompt": "x',
        "NaN": b'{"prompt": "x", "temperature": NaN}',
        "deep JSON": b"[" * 10**5,
        "a deep value": b'{"prompt":' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
        "half a character": rb'{"prompt": "\ud800"}',
        "no UTF-8": b'{"prompt": "\xff\xfe"}',
        "a pickle": pickle.dumps(Image.Exif),
        "nothing": b"",
        "two values": b'{"prompt":"x"}{}',
        "a NUL": b"\0",
        "a million unknown keys": json.dumps(dict.fromkeys(map(str, range(10**6)), 0)).encode(),
        "millions of values": b'{"prompt":"x","examples":[' + b"0," * 5_000_000 + b"0]}",
    }.items():
        yield _json(name, "/v1/write", body)
    part = (
        b'--b\r\nContent-Disposition: form-data; name="images"; filename="x"\r\n\r\n'
        + encoded("PNG")
        + b"\r\n--b--\r\n"
    )
    kind = "multipart/form-data; boundary=b"
    for name, content_type, body in (
        ("form without a boundary", "multipart/form-data", part),
        ("form of another boundary", "multipart/form-data; boundary=c", part),
        ("form with an endless boundary", "multipart/form-data; boundary=" + "b" * 5000, part),
        ("form that is cut off", kind, part[:60]),
        ("form of garbage", kind, b"\0" * 999),
        ("form of no field", kind, b"--b--\r\n"),
        ("form with a nameless part", kind, b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n"),
        ("form without a disposition", kind, b"--b\r\n\r\nx\r\n--b--\r\n"),
        (
            "form of many fields",
            kind,
            b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n' * 999 + b"--b--\r\n",
        ),
        (
            "form of many files",
            kind,
            b'--b\r\nContent-Disposition: form-data; name="images"; filename="x"\r\n\r\nx\r\n' * 99 + b"--b--\r\n",
        ),
        ("form with a long head", kind, b"--b\r\nX: " + b"x" * 10**5 + b"\r\n\r\nx\r\n--b--\r\n"),
        (
            "form of a strange charset",
            kind + "; charset=no-such",
            b'--b\r\nContent-Disposition: form-data; name="kind"\r\n\r\n\xff\r\n--b--\r\n',
        ),
        ("form with a field of another task", kind, part.replace(b'"images"', b'"prompt"')),
        ("form with a strange name", kind, part.replace(b'"images"', b'"__class__"')),
        ("text", "text/plain", b"x"),
        ("XML", "application/xml", b"<x/>"),
        ("no type", "", b"x"),
        ("url-encoded form", "application/x-www-form-urlencoded", b"images=x"),
        ("a pickle by its type", "application/x-pickle", b"\x80\x04N."),
    ):
        yield Case(name, "/v1/caption", body, {"Content-Type": content_type})


def _requests() -> Iterator[Case]:
    for method, path in (
        ("PUT", "/v1/caption"),
        ("GET", "/v1/write"),
        ("DELETE", "/v1/caption"),
        ("POST", "/health"),
        ("PATCH", "/"),
    ):
        yield Case(f"{method} {path}", path, method=method)
    get, post = (b"%s HTTP/1.1\r\nHost: 127.0.0.1\r\n" % what for what in (b"GET /health", b"POST /v1/caption"))
    for name, raw in {
        "no HTTP": b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(99) + b"\r\n\r\n",
        "an empty line": b"\r\n\r\n\r\n\0\r\n\r\n",
        "no version": get.replace(b" HTTP/1.1", b"") + b"\r\n",
        "HTTP/2 by force": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "no host": b"GET /health HTTP/1.1\r\n\r\n",
        "two hosts": get + b"Host: 127.0.0.1\r\n\r\n", "a NUL in a head": get + b"X: \0\r\n\r\n",
        "a head of 100 kB": get + b"X: " + b"x" * 10**5 + b"\r\n\r\n",
        "many heads": get + b"X: y\r\n" * 20_000 + b"\r\n",
        "an address of 300 kB": get.replace(b"/health", b"/" + b"x" * 3 * 10**5) + b"\r\n",
        "a negative length": post + b"Content-Length: -1\r\n\r\n",
        "two lengths": post + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nxxxxxx",
        "a length in words": post + b"Content-Length: many\r\n\r\n",
        "a length of 10 TB": post + b"Content-Length: 10000000000000\r\n\r\nxx",
        "length and chunks": post
        + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x HTTP/1.1\r\n\r\n",
        "chunks of garbage": post + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nxx\r\n",
        "another coding": post + b"Transfer-Encoding: gzip\r\n\r\nxx",
        "a folded head": get.replace(b"health", b"nothing") + b"X: a\r\n b\r\n\r\n",
        "a head with a blank": get + b"X : a\r\n\r\n",
        "no address of origin": get + b"Origin: http://[\r\n\r\n",
        "a websocket": get.replace(b"health", b"v1/write") + b"Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    }.items():  # fmt: skip
        yield Case(name, raw=raw)
