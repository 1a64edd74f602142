"""The verbs that put a run to work, as a person meets them; all in one process: torch takes seconds to import."""

import json
import shutil
from pathlib import Path

import pytest
from click import UsageError
from click.testing import CliRunner, Result
from PIL import Image

from launch.cli import m6
from tests.training.made_checkpoint import make_checkpoints, make_image_tokenizer, make_recipe
from tests.training.small_run import write_pictures
from training.data.corpus import Corpus
from training.errors import UserError
from training.evaluation import Samples
from training.recipe import TASK_NAMES

QUESTION = "属于哪一类?"


@pytest.fixture(scope="module")
def home(sample_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/first, runs/second and pictures/."""
    home = tmp_path_factory.mktemp("home")
    recipe = make_recipe(sample_corpus).model_copy(
        update={"tasks": dict.fromkeys(TASK_NAMES, 1.0), "global_batch": 128}
    )
    for name, step in (("first", 3), ("second", 4)):
        make_checkpoints(home / "runs" / name / "checkpoints", recipe, sample_corpus, step)
    make_image_tokenizer(sample_corpus, home / "runs")
    drawer = recipe.model_copy(update={"image_tokenizer": "runs"})
    make_checkpoints(home / "drawer" / "checkpoints", drawer, sample_corpus, 1)
    write_pictures(sample_corpus, list(range(6)), home / "pictures")
    return home


@pytest.fixture(autouse=True)
def _at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def run(*arguments: str) -> Result:
    done = CliRunner().invoke(m6, arguments, standalone_mode=False)
    if done.exception:
        raise done.exception
    return done


def test_pictures_are_captioned_a_line_each() -> None:
    names = [f"pictures/{number}.png" for number in range(3)]
    lines = run("caption", *names, "--run", "first").stdout.splitlines()
    assert [line.split("\t")[0] for line in lines] == names
    rows = json.loads(run("caption", *names, "--run", "first", "--json").stdout)
    assert [f"{row['image']}\t{row['caption']}" for row in rows] == lines
    assert run("caption", names[0], "--run", "first").stdout.rstrip("\n") == rows[0]["caption"]


def test_the_run_that_saved_last_is_taken_and_named() -> None:
    done = run("caption", "pictures/0.png")
    assert done.stderr == "using run second\n"
    assert done.stdout == run("caption", "pictures/0.png", "--run", "second").stdout


def test_without_a_run_the_way_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no run under runs/ has a checkpoint: train one \(m6 train …\)"):
        run("caption", "x.png")


def test_questions_are_answered_from_the_choices() -> None:
    choices = ("--choice", "红", "--choice", "蓝")
    assert run("ask", "pictures/0.png", QUESTION, *choices, "--run", "first").stdout in ("红\n", "蓝\n")
    assert run("ask", QUESTION, "--choice", "红", "--run", "first").stdout == "红\n"
    assert run("ask", QUESTION, "--run", "first").exit_code == 0


def test_writing_streams_and_repeats() -> None:
    arguments = ("write", "写一首诗。", "--tokens", "12", "--run", "first")
    assert run(*arguments).stdout == run(*arguments).stdout != run(*arguments, "--seed", "5").stdout
    assert run(*arguments, "--example", "写诗 => 春眠\n不觉晓").stdout != run(*arguments).stdout


def test_an_edited_picture_keeps_its_size_and_the_rest(home: Path) -> None:
    Image.new("RGB", (90, 60), "red").save(home / "scene.png")
    arguments = ("edit", "scene.png", "--text", "大红色圆", "--tries", "2", "--steps", "2", "--run", "drawer")
    assert run(*arguments, "--region", "10,5,30,20", "--to", "new.png").stdout == "new.png\n"
    edited = Image.open(home / "new.png")
    assert edited.size == (90, 60)
    red = edited.crop((40, 0, 90, 60)).getcolors()
    assert red == [(50 * 60, (255, 0, 0))]
    mask = Image.new("L", (90, 60))
    mask.paste(255, (10, 5, 40, 25))
    mask.save(home / "mask.png")
    names = run(*arguments, "--mask", "mask.png", "--reference", "pictures/0.png", "--pictures", "2").stdout.split()
    assert names == ["edited-1.png", "edited-2.png"] and {Image.open(home / name).size for name in names} == {(90, 60)}


def test_drawings_have_the_size_that_is_asked_for_or_one_to_look_at(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("draw", "大红色圆", "--pictures", "1", "--tries", "2", "--run", "drawer", "--to", "drawn.png")
    for size, least, side in ((None, 256, 256), ("32", 256, 256), ("32", 20, 32)):
        monkeypatch.setattr("launch.use.DRAWN", least)
        run(*arguments, *(("--size", size, "--steps", "1") if size else ()))
        assert Image.open(home / "drawn.png").size == (side, side)


def test_search_keeps_its_index_and_draws_a_sheet(home: Path) -> None:
    arguments = ("search", "红色", "--images", "pictures", "-k", "4", "--run", "first")
    lines = run(*arguments, "--sheet", "sheet.png").stdout.splitlines()
    assert len(lines) == 4 and all("pictures/" in line for line in lines)
    assert Image.open(home / "sheet.png").size == (640, 178)
    (kept,) = (home / "runs" / ".indexes").iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    rows = json.loads(run(*arguments, "--json").stdout)
    assert [row["image"] for row in rows] == [line.split()[1] for line in lines]
    assert before == {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}


def test_an_index_that_cannot_be_kept_is_no_failure(home: Path) -> None:
    shutil.rmtree(home / "runs" / ".indexes", ignore_errors=True)
    (home / "runs" / ".indexes").write_text("in the way")
    done = run("search", "红色", "--images", "pictures", "--run", "first")
    assert "the index is not kept" in done.stderr and len(done.stdout.splitlines()) == 6
    (home / "runs" / ".indexes").unlink()


def test_evaluation_of_the_corpus_stands_beside_its_rivals(
    home: Path, sample_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.samples.TEXTS", 1)
    for split in ("validation", "test"):
        done = run("eval", "--run", "first", "--split", split, "--json", "out.json")
        report = json.loads((home / "out.json").read_text())
        assert report["step"] == 3 and report["split"] == split
        for found in (report[f"retrieval{whose}"] for whose in ("", "_ridge", "_ridge_stored")):
            assert found["image_to_text"].keys() >= {"r1", "r5", "r10", "n", "chance_r10"}
        assert report["caption"].keys() >= {"exact", "chrf", "cider", "blank_image"}
        for kind in ("poem", "review"):
            texts = report[f"text_{kind}"]
            assert texts["unprompted"]["n"] == len(sample_corpus.text_rows(split, kind))
            assert texts["unprompted"]["bits_per_character"] > texts["5-gram, all training text"]["bits_per_character"]
        assert all(title in done.stdout for title in ("Finding", "Naming", "Answering", "Writing"))
        left = home / "runs" / "first" / "evaluation"
        assert json.loads((left / "figures.json").read_text()) == report
        shown = Samples.model_validate_json((left / "samples.json").read_bytes())
        assert shown.searches and {one.task for one in shown.sayings} == {"caption", "ask", "poem", "review"}
        assert not shown.drawings  # for want of an image tokenizer
        assert done.stdout.endswith(f"page: {left / 'index.html'}\n") and (left / "index.html").is_file()


def test_evaluation_of_a_strangers_files(home: Path) -> None:
    rows = [{"image": f"pictures/{n}.png", "zh": f"图{n}", "en": None} for n in range(6)]
    (home / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (home / "texts.jsonl").write_text('{"text": "床前明月光", "title": "静夜思"}\n')
    run("eval", "--run", "first", "--pairs", "pairs.jsonl", "--text", "texts.jsonl", "--json", "out.json")
    report = json.loads((home / "out.json").read_text())
    assert report["retrieval"]["text_to_image"]["n"] == 6 and report["caption"]["n"] == 6
    assert report["text"]["bits_per_character"] > 0 and "text_poem" not in report
    assert "图0" in (home / "runs" / "first" / "evaluation-of-files" / "index.html").read_text()


def test_what_cannot_be_is_refused_before_a_model_is_loaded() -> None:
    for arguments, message in (
        (("ask", "a", "b", "c"), "more than an IMAGE and a QUESTION"),
        (("draw", "x", "--pictures", "5", "--tries", "4"), "cannot be more than --tries 4"),
        (("edit", "x.png", "--region", "1,2,3"), "'1,2,3' is not four whole numbers: LEFT,TOP,WIDTH,HEIGHT"),
        (("edit", "x.png"), "say what is redrawn, by --region or by --mask"),
        (("edit", "x.png", "--region", "1,2,3,4", "--mask", "m.png"), "by --region or by --mask"),
        (("write", "x", "--seed", "-1"), "-1 is not in the range"),
        (("write", "x", "--example", "写诗 春眠"), "must be 'PROMPT => TEXT'"),
        (("write", "x", "--example", "写诗 => "), "must be 'PROMPT => TEXT'"),
    ):
        with pytest.raises(UsageError, match=message):
            run(*arguments)
