"""Files and folders that change places."""

import ctypes
import errno
from types import SimpleNamespace

import pytest

from training.files import exchange


@pytest.mark.parametrize("at_once", [True, False])
def test_folders_change_places(tmp_path, monkeypatch, at_once):
    """Also where the file system cannot do it at once."""
    if not at_once:
        library = SimpleNamespace(renameat2=lambda *_: ctypes.set_errno(errno.EINVAL) or -1)
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: library)
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        path.mkdir()
        (path / f"of {path.name}").touch()
    exchange(one, other)
    assert (other / "of one").is_file() and (one / "of other").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other"]


def test_what_is_not_there_changes_nothing(tmp_path):
    (tmp_path / "one").mkdir()
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "one", tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
