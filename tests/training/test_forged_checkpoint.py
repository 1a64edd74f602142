"""What a stranger may have made of a checkpoint, checksums and all, is refused in one line."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from launch.checkpoints import export_run
from tests.training.made_checkpoint import make_checkpoints, make_recipe
from training import checkpoint, checkpoint_files
from training.checkpoint_files import checksum
from training.data.corpus import Corpus
from training.errors import UserError
from training.tensor_files import LENGTH, OFFSETS

FILE = "rank-00000.safetensors"


@pytest.fixture(scope="module")
def made(sample_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_checkpoints(folder, make_recipe(sample_corpus), sample_corpus, 1)
    return folder / "step-1"


def seal(path: Path, manifest: Any) -> None:
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    (path / checkpoint_files.MANIFEST).write_text(text)
    (path / checkpoint_files.SEAL).write_text(xxhash.xxh3_128_hexdigest(text.encode()))


def listed(path: Path, **changes: Any) -> dict[str, Any]:
    """The manifest, with the files as they are now."""
    manifest = json.loads((path / checkpoint_files.MANIFEST).read_text())
    return manifest | {"files": {FILE: checksum(path / FILE)}} | changes


def with_head(path: Path, forge: Callable[[dict[str, Any]], None]) -> None:
    """Change the head of the file, and the manifest to agree with it."""
    raw = (path / FILE).read_bytes()
    size = int.from_bytes(raw[:LENGTH], "little")
    head = json.loads(raw[LENGTH : LENGTH + size])
    forge(head)
    text = json.dumps(head).encode()
    (path / FILE).write_bytes(len(text).to_bytes(LENGTH, "little") + text + raw[LENGTH + size :])
    seal(path, listed(path))


def name_above(path: Path) -> str:
    seal(path, listed(path, files={"../../x": {"bytes": 1, "xxh3": ""}}))
    return r"manifest.json: '\.\./\.\./x' is no name of a checkpoint's file"


def name_from_the_root(path: Path) -> str:
    seal(path, listed(path, files={"/etc/passwd": {"bytes": 1, "xxh3": ""}}))
    return "'/etc/passwd' is no name"


def no_size(path: Path) -> str:
    seal(path, listed(path, files={FILE: {"bytes": "many", "xxh3": ""}}))
    return "listed without its size and checksum"


def no_mapping(path: Path) -> str:
    seal(path, [1, 2])
    return "checkpoint format None, this program reads"


def no_files(path: Path) -> str:
    seal(path, listed(path, files=[FILE]))
    return "manifest.json: it is no checkpoint's"


def too_deep(path: Path) -> str:
    seal(path, "[" * 100_000)
    return "manifest.json: cannot be read"


def file_added(path: Path) -> str:
    shutil.copy(path / FILE, path / "rank-00001.safetensors")
    return "manifest.json: rank-00001.safetensors is not listed"


def link(path: Path) -> str:
    (path / FILE).rename(path.parent / "elsewhere")
    (path / FILE).symlink_to(path.parent / "elsewhere")
    return f"{FILE}: .*a link or a special file"


def pipe(path: Path) -> str:
    """Who opens one waits for ever."""
    (path / FILE).unlink()
    os.mkfifo(path / FILE)
    seal(path, json.loads((path / checkpoint_files.MANIFEST).read_text()) | {"files": {FILE: {"bytes": 0, "xxh3": ""}}})
    return f"{FILE}: .*a link or a special file"


def absurd_head(path: Path) -> str:
    raw = (path / FILE).read_bytes()
    (path / FILE).write_bytes((2**62).to_bytes(LENGTH, "little") + raw[LENGTH:])
    seal(path, listed(path))
    return f"{FILE}: not a checkpoint's file .*header too large"


def overlapping_tensors(path: Path) -> str:
    def forge(head: dict[str, Any]) -> None:
        head["norm.weight.master"]["data_offsets"] = head["norm.bias.master"]["data_offsets"]

    with_head(path, forge)
    return f"{FILE}: not a checkpoint's file"


def huge_shape(path: Path) -> str:
    with_head(path, lambda head: head["norm.weight.master"].update(shape=[2**62, 8]))
    return f"{FILE}: not a checkpoint's file .*overflow"


def other_dtype(path: Path) -> str:
    with_head(path, lambda head: head["norm.weight.master"].update(dtype="I32"))
    return f"{FILE}: 'norm.weight.master' is I32, where a checkpoint has F32"


def matrix(path: Path) -> str:
    with_head(path, lambda head: head["norm.weight.master"].update(shape=[4, 8]))
    return f"{FILE}: not a checkpoint's file"


def no_offsets(path: Path) -> str:
    with_head(path, lambda head: head["__metadata__"].pop(OFFSETS))
    return f"{FILE}: not a checkpoint's file"


def hole(path: Path) -> str:
    def forge(head: dict[str, Any]) -> None:
        offsets = json.loads(head["__metadata__"][OFFSETS]) | {"norm.weight.master": {"saved_offsets": [7]}}
        head["__metadata__"][OFFSETS] = json.dumps(offsets)

    with_head(path, forge)
    return f"{FILE}: 'norm.weight.master' goes on at 7 where 0 is due"


FOUND_BY_SUMS = [name_above, name_from_the_root, no_size, no_mapping, no_files, too_deep, file_added, link, pipe]
FOUND_IN_HEADS = [absurd_head, overlapping_tensors, huge_shape, other_dtype, matrix, no_offsets, hole]


def resume(path: Path) -> None:
    """As training does, up to where it would touch the engine."""
    manifest = checkpoint_files.read_manifest(path)
    for name, facts in manifest["files"].items():
        if problem := checkpoint_files.damage(path, name, facts):
            raise UserError(problem)
    checkpoint.load(None, path, manifest, lambda: None)


def export(path: Path) -> None:
    export_run(str(path), target=path.parent / "export")


@pytest.mark.parametrize("read", [resume, export])
@pytest.mark.parametrize("forge", [*FOUND_BY_SUMS, *FOUND_IN_HEADS])
def test_a_forged_checkpoint_is_refused(
    made: Path, tmp_path: Path, forge: Callable[[Path], str], read: Callable[[Path], None]
) -> None:
    path = tmp_path / "checkpoints" / "step-1"
    shutil.copytree(made, path)
    message = forge(path)
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(path))
    assert not (path.parent / "export").exists()
    if forge in FOUND_BY_SUMS:
        assert len(checkpoint_files.problems(path)) == 1


@pytest.mark.parametrize("steps", [10**12, -1, True, 1.0, None])
def test_steps_of_adam_that_were_never_taken_are_refused(made: Path, tmp_path: Path, steps: object) -> None:
    """Each would be taken again."""
    path = tmp_path / "step-1"
    shutil.copytree(made, path)
    seal(path, listed(path, adam_step=steps))
    with pytest.raises(UserError, match=rf"step-1: adam_step {steps} is none of its 1 steps"):
        resume(path)


def test_one_of_another_model_or_corpus_is_refused(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "step-1"
    shutil.copytree(made, path)
    whole = listed(path)
    model = whole["recipe"]["model"]
    for changes, message in (
        ({"recipe": whole["recipe"] | {"model": model | {"layers": 2}}}, r"another model \('layers\.2\..*' is in it"),
        (
            {"recipe": whole["recipe"] | {"model": model | {"layers": 4}}},
            r"another model \('layers\.3\..*' is not in it",
        ),
        ({"recipe": whole["recipe"] | {"model": model | {"ffn": 64}}}, r"another model \(layers\.0.* has .* values"),
        ({"recipe": None}, "manifest.json: must be key: value pairs"),
        ({"recipe": whole["recipe"] | {"model": "m7"}}, r"manifest.json: .*m7"),
        ({"tokenizer": "another"}, "trained on another tokenizer than .* give its own with --data"),
        ({"data": "another"}, "trained on another data than"),
    ):
        seal(path, whole | changes)
        with pytest.raises(UserError, match=message) as caught:
            export(path)
        assert "\n" not in str(caught.value)
