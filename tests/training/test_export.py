"""A checkpoint's weights are exported whole and unchanged, in little memory, and give the engine's logits."""

import _pickle
import io
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from launch.checkpoints import export_run
from tests.model.samples import sample_batch
from tests.ranks import run_ranks
from tests.training import engine_ranks as ranks
from tests.training.made_checkpoint import first_model, make_checkpoints, make_recipe
from training.data.corpus import Corpus
from training.errors import UserError
from training.export import CONFIG, INDEX, WEIGHTS, load_exported

STEP = 3
BATCH = 7  # of the global order: one that was not trained on

SMALL = ranks.MODEL | {"ffn": 256}  # the sizes below are its


def train_and_save(data: Path, folder: Path) -> dict[str, Any]:
    """Train to STEP, save there: the state, and what the model says next."""
    from training import checkpoint, checkpoint_files, states

    ds = ranks.settings(ranks.NONE, 2)
    rank = ranks.Rank(data, folder / "swap", ds, {"data": str(data), "model": SMALL})
    rank.train(0, STEP)
    corpus = rank.collate.corpus
    facts = {
        "adam_step": states.adam_step(rank.engine),
        "recipe": rank.recipe.model_dump(mode="json"),
        "tokenizer": corpus.tokenizer.sha256,
        "data": corpus.fingerprint,
    }
    saver = checkpoint.Saver(folder / "checkpoints", checkpoint_files.Retention(1), 2**30)
    saver.save(states.parts(rank.engine), STEP, facts)
    outcome = saver.wait()
    assert outcome is not None and not outcome.error, outcome
    batch = unlabelled(rank)
    return {"digests": ranks.state_digests(rank), "batch": batch, "logits": rank.engine.next_logits(batch)}


def unlabelled(rank: ranks.Rank) -> dict[str, Tensor]:
    return {key: value for key, value in rank.batches.step(BATCH)[0].items() if key != "labels_BT"}


@pytest.fixture(scope="module")
def trained(sample_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A run that two ranks trained (ep 2) and saved; its fp32 export is beside the checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    results = run_ranks(2, train_and_save, sample_corpus.folder.parent, folder)
    export_run(str(folder), target=folder / "fp32", dtype="fp32")
    return folder, results


@torch.no_grad()
@torch.no_grad()
def logits(folder: Path, batch: dict[str, Tensor], **memory: Any) -> Tensor:
    return load_exported(folder, **memory)(batch)["logits_BV"]


def test_every_weight_is_the_master_to_the_bit(trained: Any) -> None:
    folder, results = trained
    parts: dict[str, dict[int, bytes]] = {}
    for result in results:
        for key, found in result["digests"].items():
            parts.setdefault(key, {}).update(found)
    weights = load_file(folder / "fp32" / WEIGHTS)
    assert {f"{name}.master" for name in weights} == {key for key in parts if key.endswith(".master")}
    for name, weight in weights.items():
        assert weight.numpy().tobytes() == b"".join(part for _, part in sorted(parts[f"{name}.master"].items())), name
    assert weights["layers.1.moe.experts.w1_EDF"].shape == (8, 64, 256)


def test_the_exported_model_says_what_the_engine_says(trained: Any) -> None:
    folder, results = trained
    for result in results:
        torch.testing.assert_close(logits(folder / "fp32", result["batch"]), result["logits"], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_from_the_disk_it_says_the_same(trained: Any) -> None:
    folder, results = trained
    batch = results[0]["batch"]
    model = load_exported(folder / "fp32", max_memory={"cpu": "2.2MB"})
    placed = model.hf_device_map
    assert set(placed.values()) == {"cpu", "disk"} and placed["layers"] == "disk"
    assert model.get_parameter("layers.1.moe.experts.w1_EDF").is_meta
    assert torch.equal(model(batch)["logits_BV"], logits(folder / "fp32", batch))
    assert torch.equal(logits(folder / "fp32", batch, device_map={"": "disk"}), logits(folder / "fp32", batch))


def test_shards_and_bf16(trained: Any, tmp_path: Path) -> None:
    folder, results = trained
    export_run(str(folder), target=tmp_path / "bf16", shard_size="400KB")
    index = json.loads((tmp_path / "bf16" / INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) > 3 and names[0] == f"model-00001-of-{len(names):05}.safetensors"
    assert {path.name for path in (tmp_path / "bf16").iterdir()} == {
        *names, INDEX, CONFIG, "tokenizer.model", "feature_network.safetensors"
    }  # fmt: skip
    whole = load_file(folder / "fp32" / WEIGHTS)
    assert index["metadata"]["total_size"] == sum(2 * weight.numel() for weight in whole.values())
    for name in names:
        shard = load_file(tmp_path / "bf16" / name)
        assert len(shard) == 1 or sum(weight.nbytes for weight in shard.values()) <= 400_000
        for key, weight in shard.items():
            assert index["weight_map"][key] == name and torch.equal(weight, whole[key].bfloat16())
    batch = results[0]["batch"]
    said = logits(tmp_path / "bf16", batch)
    torch.testing.assert_close(said, results[0]["logits"], rtol=0.1, atol=0.1)
    assert torch.equal(said, logits(tmp_path / "bf16", batch, device_map={"": "disk"}))


def test_equal_checkpoints_give_equal_bytes(trained: Any, tmp_path: Path) -> None:
    folder, _ = trained
    export_run(str(folder / "checkpoints" / f"step-{STEP}"), target=tmp_path / "again", dtype="fp32")
    for path in (folder / "fp32").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


class Bomb:
    """What a stranger's pickle does when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple[Path]]:
        return Path.touch, (self.path,)


def load_without_pickle(data: Path, run: Path, blown: Path) -> dict[str, Any]:
    """Verify, resume, export and load where whatever unpickles fails.

    The ranks' collectives keep the unpickler that torch took when it was imported: they read what ranks send, and no
    files. Of them too the audit hook forbids whatever is more than numbers, text and lists of these.
    """
    from training import checkpoint, checkpoint_files

    rank = ranks.Rank(data, run / "swap", ranks.settings(ranks.NONE, 1), {"model": SMALL})
    unpickler = _pickle.Unpickler

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        setattr(pickle, name, refuse)
    torch.load = refuse
    sys.addaudithook(lambda event, _: refuse() if event == "pickle.find_class" else None)
    with pytest.raises(AssertionError, match="unpickled"):
        unpickler(io.BytesIO(pickle.dumps(Bomb(blown)))).load()

    found = checkpoint.newest(run / "checkpoints")
    assert found is not None and checkpoint_files.problems(found.path) == []
    checkpoint.load(rank.engine, found.path, found.manifest, rank.blank_step)
    export_run(str(run), target=run / "without", dtype="fp32")
    batch = unlabelled(rank)
    return {"engine": rank.engine.next_logits(batch), "exported": logits(run / "without", batch)}


def test_nothing_that_reads_a_checkpoint_unpickles(trained: Any, sample_corpus: Corpus, tmp_path: Path) -> None:
    folder, results = trained
    for name in (".metadata", "pytorch_model.bin"):  # where torch's and accelerate's own readers would look
        (folder / "checkpoints" / f"step-{STEP}" / name).write_bytes(pickle.dumps(Bomb(tmp_path / "blown")))
    [said] = run_ranks(1, load_without_pickle, sample_corpus.folder.parent, folder, tmp_path / "blown")
    assert not (tmp_path / "blown").exists()
    assert torch.equal(said["exported"], said["engine"])  # one rank, all experts: the very same sums
    torch.testing.assert_close(said["engine"][:4], results[0]["logits"], rtol=1e-4, atol=1e-5)


MEASURE = """
import ctypes, gc, json, sys
from pathlib import Path
import torch
from launch.checkpoints import export_run
from tests.model.samples import sample_batch
from training.export import load_exported

def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024

def growth(action):
    "The peak of this process' memory over what it has now."
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what is taken now
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    result = action()
    return status("VmHWM") - before, result

def say(**memory):
    model = load_exported(Path(sys.argv[2]), **memory)
    return model(sample_batch(model.config))["loss_B"]

export_run(sys.argv[3])  # what libraries take once
exported, _ = growth(lambda: export_run(sys.argv[1], target=Path(sys.argv[2]), dtype="fp32"))
say(device_map={"": "disk"})
bounded, losses = growth(lambda: say(max_memory={"cpu": 90_000_000}))
whole, expected = growth(say)
print(json.dumps([exported, bounded, whole, torch.equal(losses, expected)]))
"""


def test_memory_is_bounded_by_buffers_and_by_a_layer_not_by_the_model(sample_corpus: Corpus, tmp_path: Path) -> None:
    recipe = make_recipe(sample_corpus, layers=6, hidden=128, ffn=1024, experts=32)
    make_checkpoints(tmp_path / "checkpoints", recipe, sample_corpus, 1)
    size = 4 * recipe.model_shape().parameter_counts().total
    small = tmp_path / "small"
    make_checkpoints(small / "checkpoints", make_recipe(sample_corpus), sample_corpus, 1)
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(tmp_path / "export"), str(small)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    exported, bounded, whole, equal = json.loads(done.stdout.splitlines()[-1])
    print(f"model {size:,}; growth: export {exported:,}, from the disk {bounded:,}, in memory {whole:,}")
    assert equal and size > 200_000_000
    a_layer = size / 6
    assert exported < 64_000_000 and bounded < 90_000_000 + a_layer and whole > 0.9 * size


@pytest.fixture(scope="module")
def exported(sample_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_checkpoints(folder / "checkpoints", make_recipe(sample_corpus), sample_corpus, 1)
    export_run(str(folder), target=folder / "fp32", dtype="fp32", shard_size="100KB")
    return folder / "fp32"


def test_a_gpu_that_is_not_there_is_told(exported: Path) -> None:
    gpus = torch.cuda.device_count()
    with pytest.raises(UserError, match=rf"max_memory: there is no GPU {gpus} here, but {gpus}; leave it out"):
        load_exported(exported, max_memory={gpus: "20GB", "cpu": "60GB"})


def test_dense_shared_and_pixel_models_too(sample_corpus: Corpus, tmp_path: Path) -> None:
    for number, changes in enumerate(({"experts": 0, "k": 1}, {"share_layers": True, "gated_experts": True})):
        pixels = {"image_input": "pixels", "image_channels": 48, "image_patches": 4}
        recipe, run = make_recipe(sample_corpus, **changes, **pixels), tmp_path / str(number)
        make_checkpoints(run / "checkpoints", recipe, sample_corpus, 1)
        export_run(str(run), dtype="fp32")
        folder = run / "exports" / "step-1"
        assert {path.name for path in folder.iterdir()} == {WEIGHTS, CONFIG, "tokenizer.model"}
        batch = sample_batch(recipe.model_shape())
        expected = first_model(recipe, 1)(batch)["loss_B"]
        assert torch.equal(load_exported(folder)(batch)["loss_B"], expected)
        assert torch.equal(load_exported(folder, device_map={"": "disk"})(batch)["loss_B"], expected)


def no_config(folder: Path) -> str:
    (folder / CONFIG).unlink()
    return "no export there"


def another_dtype(folder: Path) -> str:
    change(folder / CONFIG, dtype="fp64")
    return "config.json: dtype: "


def impossible_shape(folder: Path) -> str:
    model = json.loads((folder / CONFIG).read_text())["model"]
    change(folder / CONFIG, model=model | {"heads": 7})
    return "hidden=32 is not divisible by heads=7"


def another_shape(folder: Path) -> str:
    model = json.loads((folder / CONFIG).read_text())["model"]
    change(folder / CONFIG, model=model | {"ffn": 64})
    return r"safetensors: layers\.\d.* is F32 \[8, .*, not F32 \["


def name_outside(folder: Path) -> str:
    where = json.loads((folder / INDEX).read_text())["weight_map"]
    change(folder / INDEX, weight_map=where | {"norm.bias": "../../elsewhere.safetensors"})
    return r"'\.\./\.\./elsewhere.safetensors' is no name of an export's file"


def weight_not_listed(folder: Path) -> str:
    where = json.loads((folder / INDEX).read_text())["weight_map"]
    change(folder / INDEX, weight_map={name: file for name, file in where.items() if name != "norm.bias"})
    return "does not list the weights"


def deep_index(folder: Path) -> str:
    (folder / INDEX).write_text("[" * 100_000)
    return "does not list the weights"


def weight_missing(folder: Path) -> str:
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"]["norm.bias"]
    weights = load_file(file)
    del weights["norm.bias"]
    save_file(weights, file, {"format": "pt"})
    return "'norm.bias' is missing"


def cut_off(folder: Path) -> str:
    file = sorted(folder.glob("model-*"))[0]
    file.write_bytes(file.read_bytes()[:-1])
    return "00001-of-.*: cannot be read"


def absurd_head(folder: Path) -> str:
    file = sorted(folder.glob("model-*"))[0]
    file.write_bytes((2**62).to_bytes(8, "little") + file.read_bytes()[8:])
    return "00001-of-.*: cannot be read .*header too large"


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "spoil",
    [no_config, another_dtype, impossible_shape, another_shape, name_outside, weight_not_listed, deep_index,
     weight_missing, cut_off, absurd_head],
)  # fmt: skip
def test_what_is_no_export_is_told_in_one_line(exported: Path, tmp_path: Path, spoil: Callable[[Path], str]) -> None:
    folder = tmp_path / "export"
    shutil.copytree(exported, folder)
    message = spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_exported(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
