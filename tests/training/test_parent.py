"""Fine-tuning as a person starts it: what a recipe takes over from another run, what is refused, how it goes on."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
import yaml
from click.testing import CliRunner

from launch.cli import m6
from launch.run import TrainingRun, check_background
from tests.training.made_checkpoint import make_checkpoints, make_image_tokenizer, make_recipe
from training import M6, checkpoint_files
from training.background import Background
from training.data.corpus import Corpus
from training.data.importing.build import import_corpus
from training.data.importing.reading import Settings
from training.errors import UserError
from training.evaluation import FIGURES, FOLDER, OF_FILES, OF_OTHER, tables
from training.image_folder import image_codes
from training.own_data import check_usable
from training.parent import Parent, load_recipe, settle
from training.quality import read_pairs
from training.recipe import TASK_NAMES

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "launch" / "recipes" / "finetune.yaml"
PARENT = "runs/parent/checkpoints/step-5"
QUICK = (
    "global_batch=8", "contrast_pairs=2", "steps=2", "save_every=1", "evaluation.every=2", "evaluation.rows=4",
    "evaluation.samples=0", "tracking.wandb=disabled", "tracking.log_every=1", "schedule.warmup=0", "data=shop",
)  # fmt: skip
pytestmark = pytest.mark.timeout(300)


def write_rows(corpus: Corpus, rows: Iterator[int] | range, folder: Path) -> Path:
    """JSON lines with pictures beside them, as a stranger has them."""
    folder.mkdir(parents=True)
    lines = []
    for row in rows:
        picture = corpus.picture(row)
        (folder / f"{row}.png").write_bytes(picture.image)
        lines.append({"image": f"{row}.png", "zh": picture.zh, "en": picture.en, "tags": picture.tags,
                      "family": picture.family})  # fmt: skip
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def home(sample_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/parent, which has learned every task, and shop/, a corpus that was imported for it."""
    home = tmp_path_factory.mktemp("home")
    recipe = make_recipe(sample_corpus, bag_width=16).model_copy(
        update={"tasks": dict.fromkeys(TASK_NAMES, 1.0), "text_positions": 64}
    )
    make_checkpoints(home / "runs" / "parent" / "checkpoints", recipe, sample_corpus, 3, 5)
    (home / "runs" / "export").mkdir()
    (home / "runs" / "export" / "config.json").write_text("{}")
    source = write_rows(sample_corpus, range(60), home / "source")
    import_corpus([source], home / "shop", sample_corpus.folder.parent, Settings(split_by="family", held_out=0.6))
    return home


@pytest.fixture(autouse=True)
def _at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def test_a_recipe_takes_over_what_it_does_not_say() -> None:
    parent = Parent.at(Path(PARENT))
    recipe = load_recipe(RECIPE, ["start=parent"])
    assert recipe.start == parent.start and recipe.start.checkpoint == PARENT
    assert (recipe.model, recipe.text_positions) == (parent.recipe.model, 64)
    assert recipe.steps == 100 and recipe.learned == set(TASK_NAMES)
    other = load_recipe(RECIPE, ["start=runs/parent/checkpoints/step-3", "text_positions=48", "tune.parts=routers"])
    assert other.start and other.start.checkpoint.endswith("step-3") and other.start.digest != parent.start.digest
    assert other.text_positions == 48 and other.trained == {"routers"}
    adapted = load_recipe(RECIPE, ["start=parent", "tune.adapter_rank=2", "tune.parts=[norms]"])
    assert adapted.trained == {"adapters", "norms"} and adapted.model_shape().adapter_rank == 2


def test_every_rank_is_told_one_checkpoint() -> None:
    assert settle(RECIPE, ["steps=3", "start=parent"]) == ("steps=3", f"start={PARENT}")
    run = TrainingRun(RECIPE, ("start=parent", "steps=3")).settled()
    assert run.settled() == run and f"start={PARENT}" in run.arguments()


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as error:
        Parent.to_begin(load_recipe(RECIPE, overrides))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((), f"{RECIPE}: model is missing; say by --from whose is to be fine-tuned, or name one"),
        (("start=nobody",), "nobody: no such run; see the folders under runs/"),
        (("start=shop",), "shop: no checkpoints there"),
        (("start=runs/export",),
         "runs/export: an export does not say what its model has learned; fine-tune the run that it is of"),
        (("start=parent", "model.layers=2"),
         f"model.layers=2: it is 3 in {PARENT}, and fine-tuning keeps the model: leave it out"),
        (("start=parent", "model.adapter_rank=2"),
         "override 'model.adapter_rank=2': model.adapter_rank: adapters are set by tune.adapter_rank"),
        (("start=parent", "tune.parts=[router]"),
         "override 'tune.parts=[router]': tune.parts.0='router': is unknown; did you mean routers?"),
        (("start=parent", "tune.adapter_rank=2", "tune.parts=all"),
         "override 'tune.parts=all': tune.adapter_rank: all of the model is trained (tune.parts): leave one of the two "
         "out"),
        (("start=parent", "tune.adapter_rank=32"),
         "override 'tune.adapter_rank=32': model.adapter_rank=32: must be less than hidden and ffn, or it is not low"),
        (("start=parent", "tune.parts=bags", "tasks.contrast=0"),
         "override 'tasks.contrast=0': tune.parts: bags learn by task contrast alone: add it to the tasks, or train "
         "other parts"),
        (("model=m6-tiny", "tune.adapter_rank=2"),
         "override 'tune.adapter_rank=2': tune: it is of a model that a run has trained; say which by start (m6 train "
         "--from RUN)"),
        (("model=m6-tiny", "tune.parts=bags"),
         "override 'tune.parts=bags': tune: it is of a model that a run has trained; say which by start (m6 train "
         "--from RUN)"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(overrides: tuple[str, ...], said: str) -> None:
    assert refusal(*overrides) == said


def test_a_dry_run_says_what_is_trained() -> None:
    arguments = ["train", "--from", "parent", "--recipe", str(RECIPE), "--name", "new", "--dry-run", "--ranks", "1"]
    done = CliRunner().invoke(m6, [*arguments, *QUICK, "tune.adapter_rank=2"], standalone_mode=False)
    facts = {line[:14].strip(): line[15:] for line in done.stdout.splitlines()}
    counts = load_recipe(RECIPE, ["start=parent", "tune.adapter_rank=2"]).model_shape().parameter_counts()
    assert facts["start"] == PARENT and facts["parameters"].startswith(f"{counts.total:,}, ")
    assert facts["trained"].startswith(f"{counts.adapters:,} (") and facts["trained"].endswith("the rest is frozen")


def test_another_checkpoint_in_the_place_of_the_parent_is_refused(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "runs", tmp_path / "runs")
    os.chdir(tmp_path)
    recipe = load_recipe(RECIPE, ["start=parent"])
    manifest = checkpoint_files.read_manifest(Path(PARENT))
    text = json.dumps(manifest | {"adam_step": 1})
    (Path(PARENT) / checkpoint_files.MANIFEST).write_text(text)
    (Path(PARENT) / checkpoint_files.SEAL).write_text(xxhash.xxh3_128_hexdigest(text.encode()))
    with pytest.raises(UserError, match="it is not the checkpoint that this run starts from"):
        Parent.to_begin(recipe)


def test_data_of_another_tokenizer_or_network_are_refused(sample_corpus: Corpus, home: Path) -> None:
    parent, shop = Parent.at(Path(PARENT)), Corpus.open("shop")
    check_usable(shop, parent.path, parent.manifest, parent.recipe)
    for change in ({"tokenizer": "x"}, {"feature_network": "x"}):
        with pytest.raises(UserError, match=r"another tokenizer or feature network than shop/corpus has; .*--base"):
            check_usable(shop, parent.path, parent.manifest | change, parent.recipe)
    elsewhere = parent.recipe.model_copy(update={"data": "nowhere"})
    with pytest.raises(UserError, match="the data that it was trained on is needed"):
        check_usable(shop, parent.path, parent.manifest, elsewhere)
    known = parent.manifest | {"feature_network": sample_corpus.feature_network_sha256}
    check_usable(shop, parent.path, known, elsewhere)


def test_a_run_is_used_on_other_data_with_what_it_knows_of_its_own(sample_corpus: Corpus) -> None:
    own, elsewhere = M6.load("parent"), M6.load("parent", data="shop")
    assert elsewhere.background.digest == own.background.digest
    assert own.background.digest != Background.of(Corpus.open("shop"), own.shape).digest


def test_codes_of_other_pictures_are_made_once_and_kept(sample_corpus: Corpus, home: Path, tmp_path: Path) -> None:
    folder, shop = make_image_tokenizer(sample_corpus, tmp_path / "tokenizer"), Corpus.open("shop")
    codes = image_codes(folder, shop)
    of_base = image_codes(folder, sample_corpus)
    rows = {sample_corpus.picture(row).pil().tobytes(): row for row in range(len(sample_corpus.pictures))}
    for row in range(len(shop.pictures)):  # whose pictures are some of the base's
        same = rows[shop.picture(row).pil().tobytes()]
        assert np.array_equal(codes[row, 0], of_base[same, 0])
    [kept] = (home / "shop" / "cache").glob("codes-*.npy")
    before = kept.stat().st_mtime_ns
    assert np.array_equal(image_codes(folder, shop), codes) and kept.stat().st_mtime_ns == before
    kept.write_bytes(kept.read_bytes()[:-7])
    with pytest.raises(UserError, match="not an array of codes"):
        image_codes(folder, shop)


def train(*arguments: str, start: str = "parent") -> subprocess.CompletedProcess[str]:
    words = ["train", "--from", start, "--recipe", str(RECIPE), "--name", "tuned", "--ranks", "1", *arguments]
    program = [sys.executable, "-P", "-c", "from launch.cli import main; main()", *words]
    return subprocess.run(program, capture_output=True, text=True, timeout=280)


def events(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "event" in line]


def test_a_fine_tuned_run_goes_on_without_its_parent_and_is_measured_beside_it(
    home: Path, sample_corpus: Corpus, tmp_path: Path
) -> None:
    for name in ("runs", "shop"):
        shutil.copytree(home / name, tmp_path / name)
    os.chdir(tmp_path)
    tuned = (*QUICK, "tune.adapter_rank=2", "tune.parts=[bags]")
    done = train(*tuned)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "tuned"
    [begun] = [line for line in events(run) if line["event"] == "begun"]
    assert begun["step"] == 0 and begun["text"].startswith(f"with the weights of {PARENT}; ")
    settings = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    assert settings["start"] == Parent.at(Path(PARENT)).start.model_dump() and settings["data"] == "shop"
    m, parent = M6.load("tuned"), M6.load("parent")
    assert m.shape == parent.shape and m.learned("poem")
    # What is frozen has no fp32 masters: it is the parent's in the precision that was trained in.
    precision = json.loads((run / "run.json").read_text(encoding="utf-8"))["facts"]["precision"]
    kept = torch.bfloat16 if precision.startswith("bf16") else torch.float32
    frozen = parent.network.vocabulary.weight.to(kept).float()
    assert torch.equal(m.network.vocabulary.weight, frozen)
    assert not torch.equal(m.network.bags.words.weight, parent.network.bags.words.weight)
    known = m.background.rarity
    assert {**known, **parent.background.rarity} == known and len(m.background.patches_NPC) > 1

    # On pictures of one's own, whose families hold together, and beside the parent, there and where that had learned.
    rows = write_rows(sample_corpus, range(60, 80), tmp_path / "again")
    assert [pair.family for pair in read_pairs(rows)] == [sample_corpus.picture(row).family for row in range(60, 80)]
    arguments = ["eval", "--run", "tuned", "--pairs", str(rows), "--split", "validation"]
    measured = CliRunner().invoke(m6, arguments, standalone_mode=False)
    assert measured.exception is None, measured.exception
    figures = json.loads((run / OF_FILES / FIGURES).read_text(encoding="utf-8"))
    compared = figures["before_after"]
    assert compared["own"]["n"] == 20 and compared["elsewhere"]["text poem"]["texts"] > 1
    for found in (compared["own"]["image_to_text r5"], compared["elsewhere"]["caption chrf"]):
        assert found["difference"] == pytest.approx(found["after"] - found["before"], abs=1e-6)
        assert found["low"] <= found["difference"] <= found["high"]
    shown = [table.title for table in tables(figures)]
    assert shown[:2] == ["Before and after, on what is measured here", "Before and after, where its parent had learned"]

    # The parent goes on, its checkpoint goes: by the same command the run goes on all the same.
    shutil.rmtree(PARENT)
    again = train(*tuned, "steps=3", "--resume")
    assert again.returncode == 0, again.stderr
    assert [line["event"] for line in events(run)].count("resumed") == 1 and M6.load("tuned").step == 3
    other = train(*tuned, "steps=4", "--resume", start="runs/parent/checkpoints/step-3")
    assert other.returncode == 2 and "start.checkpoint: was 'runs/parent/checkpoints/step-5'" in other.stderr


def test_other_data_do_not_take_the_place_of_what_a_report_shows(home: Path, sample_corpus: Corpus) -> None:
    poems = [{"text": f"{word}前明月光，疑是地上霜。", "title": f"{word}夜思"} for word in "床窗门屋山水花草松竹梅兰"]
    lines = [json.dumps(poem, ensure_ascii=False) + "\n" for poem in poems]
    (home / "poems.jsonl").write_text("".join(lines), encoding="utf-8")
    sources = [home / "source" / "rows.jsonl", home / "poems.jsonl"]
    import_corpus(sources, home / "mixed", sample_corpus.folder.parent, Settings(held_out=0.6))
    arguments = ["eval", "--run", "parent", "--data", "mixed", "--split", "validation"]
    measured = CliRunner().invoke(m6, arguments, standalone_mode=False)
    assert measured.exception is None, measured.exception
    run = home / "runs" / "parent"
    figures = json.loads((run / OF_OTHER / FIGURES).read_text(encoding="utf-8"))
    assert figures["retrieval"] and not (run / FOLDER).exists()
    assert figures["text_poem"].keys() == {"unprompted", "prompted", "5-gram, all training text"}


def test_a_dry_run_tells_that_the_parents_data_are_gone(tmp_path: Path) -> None:
    parent, recipe = Parent.at(Path(PARENT)), load_recipe(RECIPE, ["start=parent", "data=shop"])
    check_background(parent, recipe)
    gone = parent.recipe.model_copy(update={"data": str(tmp_path / "gone")})
    with pytest.raises(UserError, match="the data that it was trained on is needed"):
        check_background(dataclasses.replace(parent, recipe=gone), recipe)
