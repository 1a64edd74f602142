import io
import tarfile
import zipfile

import pytest

from training.data import archives
from training.data.archives import read_tar, read_wheel
from training.errors import UserError


def tar_bytes(members: dict[str, bytes], mode: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def deb_bytes(members: dict[str, bytes]) -> bytes:
    def member(name: str, body: bytes) -> bytes:
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(body):<10}`\n".encode()
        return header + body + b"\n" * (len(body) % 2)

    control = tar_bytes({"./control": b"Package: x"}, "w:xz")
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": control, "data.tar.xz": tar_bytes(members, "w:xz")}
    return b"!<arch>\n" + b"".join(member(name, body) for name, body in parts.items())


def test_reads_wanted_members_of_tgz_and_deb(tmp_path):
    members = {"./usr/a.txt": b"one", "./usr/b.png": b"two"}
    (tmp_path / "x.tgz").write_bytes(tar_bytes(members, "w:gz"))
    (tmp_path / "x.deb").write_bytes(deb_bytes(members))
    for name in ("x.tgz", "x.deb"):
        assert list(read_tar(tmp_path / name, lambda member: member.endswith(".png"))) == [("usr/b.png", b"two")]


def test_damaged_archives_are_named(tmp_path):
    whole = tar_bytes({"a": bytes(range(256)) * 400}, "w:gz")
    for name, data in {
        "cut.tgz": whole[: len(whole) // 2],
        "no.tgz": b"no archive",
        "no.deb": b"!<arch>\nshort",
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name}: damaged archive"):
            list(read_tar(tmp_path / name, lambda member: True))


def test_huge_member_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 10)
    (tmp_path / "x.tgz").write_bytes(tar_bytes({"a": b"eleven bytes"}, "w:gz"))
    with pytest.raises(UserError, match="claims 12 bytes"):
        list(read_tar(tmp_path / "x.tgz", lambda member: True))


def test_wheel_member(tmp_path):
    path = tmp_path / "x.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("a/b", b"data")
    assert read_wheel(path, "a/b") == b"data"
    with pytest.raises(UserError, match="damaged archive"):
        read_wheel(path, "a/c")
