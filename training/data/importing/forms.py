"""Which form a stranger's file or folder is of: by its name's ending, as its maker had it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from training.data.importing.columnar import Parquet
from training.data.importing.folder import Folder
from training.data.importing.lines import JsonLines, Table
from training.data.importing.shards import Shard
from training.data.importing.sources import Source, plain
from training.errors import UserError

_FORMS: dict[str, type[Source]] = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), JsonLines),
    **dict.fromkeys((".csv", ".tsv"), Table),
    **dict.fromkeys((".tar", ".tar.gz", ".tgz"), Shard),
    ".parquet": Parquet,
}


def open_sources(paths: Sequence[Path]) -> list[Source]:
    """Each with a name of its own. Raises UserError for what is not there, or of no form."""
    sources: list[Source] = []
    for path in paths:
        if any(path.resolve() == other.path.resolve() for other in sources):
            raise UserError(f"{path}: given twice")
        sources.append(_form(path)(path, _free_name(path, sources)))
    return sources


def _form(path: Path) -> type[Source]:
    if path.is_dir():
        return Folder
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    for ending, form in _FORMS.items():
        if path.name.lower().endswith(ending):
            return form
    raise UserError(f"{path}: of no form that is known: a folder of pictures, or a file ending in {', '.join(_FORMS)}")


def _free_name(path: Path, sources: Sequence[Source]) -> str:
    name = plain(path.resolve().name)
    taken = {source.name for source in sources}
    return next(free for n in range(1, len(sources) + 2) if (free := name if n == 1 else f"{name}-{n}") not in taken)
