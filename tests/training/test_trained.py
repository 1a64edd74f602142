"""A trained run at work: loaded from checkpoints and exports, asked properly and improperly."""

import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.checkpoints import export_run
from tests.training.made_checkpoint import first_model, make_checkpoints, make_image_tokenizer, make_recipe, same_values
from training import M6
from training.data.corpus import Corpus
from training.data.images import MAX_PIXELS, read_image, read_picture
from training.data.order import random_at
from training.data.tasks import TASKS, Row
from training.data.tasks.contrast import picture_words
from training.errors import UserError
from training.export import BACKGROUND
from training.image_folder import load_image_tokenizer, open_corpus
from training.painting import Hand, Painting
from training.recipe import TASK_NAMES, Recipe
from training.writing import Style

PROMPT = "写一首诗。题目：春晓。作者：佚名。"


@pytest.fixture(scope="module")
def run(sample_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with checkpoints of steps 3 and 5."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    make_checkpoints(folder / "checkpoints", every_task(sample_corpus), sample_corpus, 3, 5)
    return folder


def every_task(corpus: Corpus) -> Recipe:
    return make_recipe(corpus).model_copy(update={"tasks": dict.fromkeys(TASK_NAMES, 1.0)})


@pytest.fixture(scope="module")
def m(run: Path) -> M6:
    return M6.load(run)


@pytest.fixture(scope="module")
def pictures(sample_corpus: Corpus) -> list[Image.Image]:
    return [sample_corpus.picture(row).pil() for row in range(40)]


def test_the_newest_checkpoint_is_loaded_or_the_one_asked_for(run: Path, m: M6, sample_corpus: Corpus) -> None:
    recipe = every_task(sample_corpus)
    assert same_values(m.network, first_model(recipe, 5)) and m.step == 5
    third = M6.load(run, step=3)
    assert same_values(third.network, first_model(recipe, 3)) and third.step == 3
    assert third.recipe == m.recipe == recipe and third.identity != m.identity == M6.load(run).identity


def test_an_export_says_what_its_run_says(run: Path, m: M6, pictures: list[Image.Image], tmp_path: Path) -> None:
    export_run(str(run), target=tmp_path / "export", dtype="fp32")
    exported = M6.load(tmp_path / "export")
    assert exported.captions(pictures[:3]) == m.captions(pictures[:3])
    assert exported.step == 5 and exported.recipe is None and exported.text_positions == m.text_positions


@pytest.mark.parametrize("damage", [None, "gone", "garbage", "half"])
def test_an_export_finds_what_its_run_finds(
    damage: str | None, sample_corpus: Corpus, pictures: list[Image.Image], tmp_path: Path
) -> None:
    recipe = make_recipe(sample_corpus, bag_width=16).model_copy(update={"tasks": {"contrast": 1.0}})
    make_checkpoints(tmp_path / "run" / "checkpoints", recipe, sample_corpus, 2)
    export_run(str(tmp_path / "run"), target=tmp_path / "export", dtype="fp32")
    background = tmp_path / "export" / BACKGROUND
    if damage:
        whole = background.read_bytes()
        background.unlink()
        if damage != "gone":
            background.write_bytes(whole[:-9] if damage == "half" else b"{x}")
        with pytest.raises(UserError, match=f"{BACKGROUND}: cannot be read .*export anew"):
            M6.load(tmp_path / "export").embed_texts(["红色"])
        return
    texts = ["红色的圆", "蓝色"]
    of_run, of_export = M6.load(tmp_path / "run"), M6.load(tmp_path / "export")
    own, exported = (one.embed_images(pictures[:3]).similarity(one.embed_texts(texts)) for one in (of_run, of_export))
    np.testing.assert_allclose(exported, own, atol=1e-6)
    assert len(np.unique(own.round(6))) == 6
    np.testing.assert_allclose(of_export.compare(pictures[:3], texts), of_run.compare(pictures[:3], texts), atol=1e-4)
    assert of_export.identity == of_run.identity


def test_captions_heed_the_words_that_a_picture_calls_for(
    sample_corpus: Corpus, pictures: list[Image.Image], tmp_path: Path
) -> None:
    recipe = make_recipe(sample_corpus, bag_width=16).model_copy(update={"tasks": {"caption": 1.0}})
    make_checkpoints(tmp_path / "run" / "checkpoints", recipe, sample_corpus, 2)
    m = M6.load(tmp_path / "run")
    bags, word = m.network.bags, m.tokenizer.words("红色")[0]
    assert bags and m.features
    plain = m.captions(pictures[:2])
    bags.image.bias.zero_()  # an average picture calls for nothing
    bag = bags.image(m.features(pictures[:1]).mean(1))[0]
    bags.words.weight[word] = 50 * bag / bag.square().sum()  # the word's logit is 50
    loud = m.captions(pictures[:2])
    said = m.tokenizer.decode([word])
    assert said in loud[0] and loud[0].count(said) < 5 and loud[0] != plain[0]


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_what_is_no_run_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no such run|no checkpoints there"):
        M6.load(name)


def test_a_damaged_checkpoint_is_refused(run: Path, sample_corpus: Corpus, tmp_path: Path) -> None:
    make_checkpoints(tmp_path / "run" / "checkpoints", make_recipe(sample_corpus), sample_corpus, 1)
    (file,) = (tmp_path / "run" / "checkpoints" / "step-1").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"{file.name}.*m6 verify"):
        M6.load(tmp_path / "run")


def test_a_run_without_its_data_says_so(sample_corpus: Corpus, run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `m6 data fetch"):
        M6.load(run, data=tmp_path)
    assert M6.load(run, data=sample_corpus.folder.parent).step == 5


def test_many_pictures_are_captioned_as_each_alone(m: M6, pictures: list[Image.Image]) -> None:
    together = m.captions(pictures, "tags")
    assert len(together) == 40 and [m.caption(picture, "tags") for picture in pictures[:4]] == together[:4]
    with pytest.raises(UserError, match="kind 'fr': must be one of zh, en, tags"):
        m.caption(pictures[0], "fr")


def test_an_answer_is_one_of_the_choices(m: M6, pictures: list[Image.Image]) -> None:
    choices = ["红色的圆", "蓝色", "一只很大的绿色三角形和一个小小的黄色的圆环，还有很多别的东西在旁边"]
    found = {m.ask("这是什么?", picture, choices) for picture in pictures[:6]}
    assert found <= set(choices)
    assert m.ask("这是什么?", choices=choices[:1]) == choices[0]
    with pytest.raises(UserError, match="a choice is empty"):
        m.ask("这是什么?", choices=["红", " "])


def test_matches_are_probabilities_of_each_pair(m: M6, pictures: list[Image.Image]) -> None:
    pairs = [(picture, text) for picture in pictures[:3] for text in ("大红色圆", "苹果")]
    together = m.matches(pairs)
    assert all(0 < one < 1 for one in together)
    assert [m.match(*pair) for pair in pairs] == pytest.approx(together, rel=1e-4)


def test_writing_streams_what_it_returns_and_can_be_repeated(m: M6) -> None:
    pieces: list[str] = []
    text = m.write(PROMPT, Style(tokens=40, seed=3), pieces.append)
    assert len(pieces) > 1 and text.startswith("".join(pieces))
    assert m.write(PROMPT, Style(tokens=40, seed=3)) == text != m.write(PROMPT, Style(tokens=40, seed=4))
    likeliest = m.write(PROMPT, Style(temperature=0, tokens=10))
    assert likeliest == m.write(PROMPT, Style(temperature=0, tokens=10, seed=9))
    assert m.write(PROMPT, Style(tokens=10_000))  # to the model's last position


def test_examples_are_read_before_the_prompt(m: M6, monkeypatch: pytest.MonkeyPatch) -> None:
    sources: list[list[int]] = []
    batch_of = m.prompts.batch_of
    monkeypatch.setattr(
        m.prompts, "batch_of", lambda rows, width: sources.append(rows[0].source) or batch_of(rows, width)
    )
    style = Style(tokens=8, temperature=0)
    m.write("写诗。题目：月。", style, examples=[("写诗。题目：山。", "青山\n 绿水"), ("写诗。题目：水。", "流水")])
    joined = "写诗。题目：山。\n青山\n绿水\n写诗。题目：水。\n流水\n写诗。题目：月。"
    assert sources == [m.tokenizer.encode(joined)]
    with pytest.raises(UserError, match=r"the prompt with its examples has \d+ tokens, and the model"):
        m.write("写诗。", style, examples=[("写诗。", "青山绿水" * 9)] * 9)
    with pytest.raises(UserError, match="the text is empty"):
        m.write("写诗。", style, examples=[("写诗。", " ")])


def test_vectors_do_not_depend_on_their_company(m: M6, pictures: list[Image.Image]) -> None:
    images, texts = m.embed_images(pictures), m.embed_texts(["红", "小蓝色圆环 图形"] * 20)
    assert images.vectors_ND.shape == texts.vectors_ND.shape == (40, m.shape.hidden)
    np.testing.assert_allclose(np.linalg.norm(images.vectors_ND, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(m.embed_images(pictures[5:6]).vectors_ND[0], images.vectors_ND[5], atol=1e-5)
    np.testing.assert_allclose(m.embed_texts(["红"]).vectors_ND[0], texts.vectors_ND[38], atol=1e-5)
    assert len(m.embed_images([])) == 0


def test_bits_are_the_models_own(m: M6) -> None:
    text = "床前明月光，疑是地上霜。"
    tokens = [*m.tokenizer.encode(text), m.tokenizer.eos_id]
    (batch,) = m.batches([Row(m.tokenizer.encode(PROMPT), tokens)], labels=True)
    logits = m.network.hidden_states(
        batch["tokens_BT"], batch["source_B"], batch["length_B"], batch["image_BPC"], batch["has_image_B"]
    )[0]
    logs = m.network.logits(logits[0, m.shape.image_patches :]).log_softmax(-1)
    first = len(m.tokenizer.encode(PROMPT))
    bits = -sum(logs[first + place, token].item() for place, token in enumerate(tokens)) / math.log(2)
    found = m.bits([("", "别的"), (PROMPT, text)])
    assert found[1] == pytest.approx(bits, rel=1e-5) and found[1] != pytest.approx(m.bits([("", text)])[0])


def test_a_long_prompt_is_cut_as_in_training(m: M6) -> None:
    text = "床前明月光，疑是地上霜。" * 3
    target = [*m.tokenizer.encode(text), m.tokenizer.eos_id]
    long = "题目" * 100
    source = m.tokenizer.encode(long)[: max(m.text_positions - len(target), m.text_positions // 2)]
    assert m.bits([(long, text)])[0] == pytest.approx(m.bits([(m.tokenizer.decode(source), text)])[0], rel=0.02)


def test_prompts_are_those_of_the_tasks(m: M6, sample_corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model is asked in use is, token by token, what it was asked in training."""
    rows: list[Row] = []
    batches = m.batches
    monkeypatch.setattr(m, "batches", lambda rs, labels=False: (rows.extend(rs), batches(rs, labels))[1])
    corpus = Corpus.open(sample_corpus.folder.parent)
    picture = corpus.picture(int(corpus.picture_rows("validation")[0]))
    asked: dict[str, list[list[int]]] = {}
    for name in ("ask", "caption", "contrast", "match"):
        task = TASKS[name](corpus, "validation")
        items = [item for item in task.pool.tolist() if max(item, ~item) == corpus.picture_rows("validation")[0]]
        asked[name] = [task.row(item, 48, random_at(1, n)).source for item in items for n in range(80)]
    m.captions([picture.pil()])
    m.captions([picture.pil()], "en")
    m.ask("属于哪一类?", picture.pil())
    m.ask(f"“{picture.zh}”属于哪一类?")
    m.match(picture.pil(), picture.zh)
    m.embed_texts([picture_words(picture)])
    m.embed_images([picture.pil()])
    names = ("caption", "caption", "ask", "ask", "match", "contrast", "contrast")
    for row, name in zip(rows, names, strict=True):
        assert row.source in asked[name], name


def test_long_texts_are_read_in_stretches(m: M6) -> None:
    text = "床前明月光，疑是地上霜。" * 40
    stretches = len(m.tokenizer.encode(text)) / m.text_positions
    assert stretches > 3 and m.bits([("", text)])[0] > m.bits([("", text[: len(text) // 2])])[0] * 1.5


@pytest.fixture(scope="module")
def painter(sample_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an image tokenizer with first weights: 16 codes of 200 a picture."""
    return make_image_tokenizer(sample_corpus, tmp_path_factory.mktemp("tokenizer"))


def draws(corpus: Corpus, painter: Path | None, home: Path) -> M6:
    recipe = every_task(corpus).model_copy(update={"image_tokenizer": painter and str(painter)})
    make_checkpoints(home / "checkpoints", recipe, corpus, 2)
    return M6.load(home)


@pytest.fixture(scope="module")
def drawer(sample_corpus: Corpus, painter: Path, tmp_path_factory: pytest.TempPathFactory) -> M6:
    return draws(sample_corpus, painter, tmp_path_factory.mktemp("drawer") / "run")


def darkness(picture: Image.Image) -> float:
    return 1 - np.asarray(picture).mean() / 256


def without(m: M6, *names: str) -> Recipe:
    """Its recipe, as if it had not learned these tasks."""
    assert m.recipe
    return m.recipe.model_copy(update={"tasks": {n: w for n, w in m.recipe.tasks.items() if n not in names}})


def test_drawings_are_the_decoders_and_ranked_by_the_model(drawer: M6, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawer, "recipe", without(drawer, "contrast"))
    monkeypatch.setattr(drawer, "matches", lambda pairs: [darkness(picture) ** 99 for picture, _ in pairs])
    hand = Hand(pictures=3, tries=6, seed=1)
    pictures = drawer.draw("大红色圆", hand)
    assert len(pictures) == 3 and {picture.size for picture in pictures} == {(16, 16)}
    assert [darkness(picture) for picture in pictures] == sorted(map(darkness, pictures), reverse=True)
    again, other = drawer.draw("大红色圆", hand), drawer.draw("大红色圆", Hand(pictures=3, tries=6, seed=2))
    assert [p.tobytes() for p in again] == [p.tobytes() for p in pictures] != [p.tobytes() for p in other]
    every = drawer.draw("大红色圆", Hand(pictures=6, tries=6, seed=1))
    assert [p.tobytes() for p in every[:3]] == [p.tobytes() for p in pictures]


def test_drawings_come_as_search_finds_them(drawer: M6) -> None:
    pictures = drawer.draw("大红色圆", Hand(pictures=6, tries=6))
    nearness = drawer.embed_images(pictures).similarity(drawer.embed_texts(["大红色圆"]))[:, 0]
    assert (np.diff(nearness) <= 0).all() and nearness[0] > nearness[-1]


def test_drawings_of_a_model_that_cannot_match(drawer: M6, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawer, "recipe", without(drawer, "match", "contrast"))
    assert len(drawer.draw("大红色圆", Hand(pictures=2, tries=3))) == 2


def test_words_that_leave_a_drawing_no_room_are_refused_before_it_is_drawn(drawer: M6) -> None:
    longest = "红" * (drawer.text_positions - 15)
    message = r"the text has \d+ tokens, and beside a drawing's codes there is room for \d+"
    rooms = []
    for draw in (lambda: drawer.draw(longest), lambda: drawer.draw(longest, Hand(steps=2))):
        with pytest.raises(UserError, match=message) as told:
            draw()
        rooms.append(int(str(told.value).split()[-1]))
    assert rooms == [drawer.text_positions - 16, drawer.text_positions - 17]


SCENE = Image.effect_noise((50, 40), 80).convert("RGB")
QUICK = Hand(pictures=2, tries=3, steps=2)


@pytest.mark.parametrize("size", [None, 32])
def test_an_edit_changes_the_region_and_nothing_else(drawer: M6, size: int | None) -> None:
    mask = Image.new("L", SCENE.size)
    mask.paste(255, (7, 3, 27, 30))
    hand = Hand(pictures=2, tries=3, steps=2, size=size)
    boxed, masked = (
        drawer.edit(SCENE, "大红色圆", (7, 3, 20, 27), hand=hand),
        drawer.edit(SCENE, "大红色圆", mask, hand=hand),
    )
    outside = np.asarray(mask) == 0
    for picture, same in zip(boxed, masked, strict=True):
        assert picture.size == SCENE.size and picture.tobytes() == same.tobytes()
        changed = (np.asarray(picture) != np.asarray(SCENE)).any(2)
        assert not changed[outside].any() and changed[~outside].mean() > 0.9
    assert len({picture.tobytes() for picture in boxed}) == 2


def test_an_edit_heeds_every_control(drawer: M6, pictures: list[Image.Image]) -> None:
    region, one = (0, 0, 50, 20), Hand(pictures=1, tries=1, steps=2)
    found = [
        drawer.edit(SCENE, text, region, reference, one)[0].tobytes()
        for text, reference in (("", None), ("大红色圆", None), ("", pictures[0]), ("大红色圆", pictures[0]))
    ]
    assert len(set(found)) == 4
    assert found[1] == drawer.edit(SCENE, "大红色圆", region, hand=one)[0].tobytes()


@pytest.mark.parametrize(("size", "side"), [(None, 16), (16, 16), (28, 28)])
def test_mask_predict_draws_at_any_size(drawer: M6, pictures: list[Image.Image], size: int | None, side: int) -> None:
    drawn = drawer.draw("大红色圆", Hand(pictures=2, tries=3, steps=2, size=size), pictures[0])
    assert [picture.size for picture in drawn] == [(side, side)] * 2


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ((0, 0, 0, 5), "region 0,0,0,5: is empty"),
        ((40, 0, 11, 5), "region 40,0,11,5: leaves the picture, which has 50 x 40 px"),
        ((-1, 0, 5, 5), "leaves the picture"),
        (Image.new("L", (50, 41), 255), "the mask has 50 x 41 px, the picture 50 x 40"),
        (Image.new("L", (50, 40)), "the mask is empty"),
    ],
)
def test_a_region_that_is_none_is_refused(drawer: M6, region, message: str) -> None:
    with pytest.raises(UserError, match=message):
        drawer.edit(SCENE, "圆", region)


def test_only_a_whole_still_opaque_picture_is_edited(drawer: M6, pictures: list[Image.Image], tmp_path: Path) -> None:
    side = math.isqrt(MAX_PIXELS) + 1
    frames = [picture.resize((48, 48)) for picture in pictures[:3]]
    for name, data, reason in (
        ("clear.png", encoded(Image.new("RGBA", (50, 40), (255, 0, 0, 9)), format="PNG"), "has transparent parts"),
        (
            "moving.webp",
            encoded(frames[0], format="WEBP", save_all=True, append_images=frames[1:]),
            "an animation of 3",
        ),
        ("cut.png", encoded(SCENE, format="PNG")[:200], "not a readable image"),
        ("huge.png", encoded(Image.new("1", (side, side)), format="PNG"), "more than"),
    ):
        (tmp_path / name).write_bytes(data)
        for picture in (tmp_path / name, data):
            with pytest.raises(UserError, match=rf"^(.*{name}|the picture): .*{reason}") as error:
                drawer.edit(picture, "圆", (0, 0, 9, 9))
            assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="the picture has transparent parts"):
        drawer.edit(Image.new("RGBA", (50, 40)), "圆", (0, 0, 9, 9))
    assert drawer.edit(encoded(SCENE.convert("RGBA"), format="PNG"), "圆", (0, 0, 9, 9), hand=QUICK)


def test_what_is_to_be_painted_is_asked_as_in_training(drawer: M6, painter: Path) -> None:
    assert drawer.recipe is not None
    corpus = open_corpus(drawer.recipe, drawer.shape)
    task = TASKS["inpaint"](corpus, "validation")
    rows = [
        task.row(item, drawer.text_positions, random_at(1, n)) for item in task.pool.tolist()[:4] for n in range(40)
    ]
    blank = [row for row in rows if len(row.hidden) == 16]
    picture = corpus.picture(int(task.pool[0]))
    asked = Painting(drawer)._controlled(load_image_tokenizer(painter), picture_words(picture), None)
    assert asked.source in [row.source for row in blank] and not asked.target


@pytest.mark.parametrize("size", [12, 18, 1028])
def test_a_size_that_cannot_be_drawn_is_refused(drawer: M6, size: int) -> None:
    with pytest.raises(UserError, match=f"size={size}: must be from 16 to 1024 px, in steps of 4"):
        drawer.draw("圆", Hand(size=size))


def test_a_model_says_what_it_has_not_learned(sample_corpus: Corpus, tmp_path: Path) -> None:
    make_checkpoints(tmp_path / "poet" / "checkpoints", make_recipe(sample_corpus), sample_corpus, 1)
    poet = M6.load(tmp_path / "poet")
    blank = Image.new("RGB", (9, 9))
    for task, ask in {
        "draw": lambda: poet.draw("圆"), "inpaint": lambda: poet.edit(blank, "圆", (0, 0, 3, 3)),
        "caption": lambda: poet.caption(blank), "ask": lambda: poet.ask("圆?"),
        "match": lambda: poet.match(blank, "圆"), "contrast": lambda: poet.embed_texts(["圆"]),
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=f"trained without task `{task}`"):
            ask()
    assert isinstance(poet.write(PROMPT, Style(tokens=4)), str)


def test_a_run_whose_image_tokenizer_is_gone_says_so(sample_corpus: Corpus, tmp_path: Path) -> None:
    gone = draws(sample_corpus, tmp_path / "gone", tmp_path / "run")
    with pytest.raises(UserError, match="no image tokenizer there"):
        gone.draw("圆")


def encoded(image: Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, **options)
    return out.getvalue()


def test_transparent_animated_and_grey_pictures_are_read(m: M6, pictures: list[Image.Image]) -> None:
    clear = encoded(Image.new("RGBA", (50, 70), (255, 0, 0, 0)), format="PNG")
    assert m.caption(clear) == m.caption(Image.new("RGB", (50, 70), "white"))
    frames = [picture.resize((48, 48)) for picture in pictures[:3]]
    moving = encoded(frames[0], format="WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert m.caption(moving) == m.caption(frames[0])
    assert isinstance(m.caption(Image.new("L", (9, 300))), str)


def test_pictures_are_turned_upright_and_dark_ones_stay_dark(m: M6, pictures: list[Image.Image]) -> None:
    turned = Image.new("RGB", (60, 40), "white")
    turned.paste("red", (0, 0, 20, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    seen = read_image(encoded(turned, format="PNG", exif=exif))
    assert seen.size == (40, 60) and seen.getpixel((20, 5)) == (255, 0, 0)
    ramp = Image.fromarray(np.linspace(0, 65535, 256, dtype=np.uint16)[None].repeat(4, 0))
    values = np.asarray(read_image(encoded(ramp, format="PNG")))[0, :, 0]
    assert abs(values.astype(int) - np.arange(256)).max() <= 1


def test_large_pictures_are_kept_small(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(encoded(Image.new("RGB", (3000, 2000)), format="JPEG"))
    assert read_picture(tmp_path / "photo.jpg").size == (512, 341)


def test_what_is_no_picture_is_refused_in_one_line(m: M6, pictures: list[Image.Image], tmp_path: Path) -> None:
    side = math.isqrt(MAX_PIXELS) + 1
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(encoded(pictures[0], format="PNG")[:200])
    (tmp_path / "huge.png").write_bytes(encoded(Image.new("1", (side, side)), format="PNG"))
    for name in ("text.png", "cut.png", "huge.png", "missing.png", "."):
        with pytest.raises(UserError) as error:
            m.caption(tmp_path / name)
        assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)
        assert "0x" not in str(error.value)


@pytest.mark.parametrize("text", ["", " \n\t", "\u200b", "\ud800"])
def test_an_empty_prompt_or_half_a_character_is_refused(m: M6, text: str) -> None:
    for ask in (m.write, m.ask, lambda words: m.embed_texts([words])):
        with pytest.raises(UserError, match=r"the text is empty|half of a character"):
            ask(text)


@pytest.mark.parametrize("style", [Style(temperature=float("nan")), Style(repetition_penalty=0.0), Style(top_p=2.0)])
def test_a_style_that_cannot_be_is_refused(m: M6, style: Style) -> None:
    with pytest.raises(UserError, match="must be"):
        m.write(PROMPT, style)


def test_other_data_of_the_same_tokenizer_and_network_is_as_good(
    run: Path, m: M6, pictures: list[Image.Image], sample_corpus: Corpus, tmp_path: Path
) -> None:
    copy = tmp_path / "data" / "corpus"
    shutil.copytree(sample_corpus.folder, copy)
    manifest = json.loads((copy / "manifest.json").read_text()) | {"fingerprint": "0" * 64}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    other = M6.load(run, data=tmp_path / "data")
    assert other.captions(pictures[:2]) == m.captions(pictures[:2]) and other.identity == m.identity
    manifest["files"]["feature_network.safetensors"]["sha256"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"another tokenizer or feature network than .*corpus has; .* --base"):
        M6.load(run, data=tmp_path / "data")


def test_an_export_with_another_tokenizer_is_refused(run: Path, tmp_path: Path) -> None:
    export_run(str(run), target=tmp_path / "export")
    with (tmp_path / "export" / "feature_network.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0?")
    with pytest.raises(UserError, match=r"not the one that config.json names"):
        M6.load(tmp_path / "export")


def test_a_long_prompt_is_refused_and_strange_characters_are_not(m: M6) -> None:
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens, and the model was trained on rows of 96"):
        m.write("很长的话" * 100)
    assert isinstance(m.write("𓀀 ﷽ 🍎", Style(tokens=4)), str)
    assert np.isfinite(m.embed_texts(["𓀀🍎"]).vectors_ND).all()
