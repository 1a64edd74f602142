"""An image tokenizer is trained on the sample corpus, stored, and read back; what is damaged or strange is refused."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from launch.cli import m6
from training import image_folder
from training.data.corpus import Corpus
from training.data.views import FixedViews, RandomViews
from training.errors import UserError
from training.image_folder import CODES, DESCRIPTION, WEIGHTS, load_image_codes, load_image_tokenizer
from training.image_recipe import ImageTokenizerRecipe, load_image_recipe
from training.image_tokenizer import METRICS, SHEET, train_image_tokenizer
from training.measures.images import psnr, ssim
from training.perceptual import PerceptualLoss
from training.recipe import parse_settings

ROOT = Path(__file__).parents[2]
SMALL = {"side": 32, "patch": 4, "widths": [24], "blocks": 1, "levels": [8, 5, 5]}


def recipe(corpus, **values):
    least = {
        "model": SMALL, "steps": 60, "batch": 8, "log_every": 10, "data": str(corpus.folder.parent),
        "optimizer": {"lr": 3e-3}, "schedule": {"warmup": 5},
    }  # fmt: skip
    return parse_settings(ImageTokenizerRecipe, {**least, **values}, [], "r.yaml")


def train(corpus, folder, **values):
    folder.mkdir()
    told = []
    measures = train_image_tokenizer(recipe(corpus, **values), folder, lambda *said: told.append(said))
    return measures, told


@pytest.fixture(scope="module")
def trained(sample_corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images") / "tokenizer"
    return folder, *train(sample_corpus, folder)


@pytest.fixture
def copy(trained, tmp_path):
    return Path(shutil.copytree(trained[0], tmp_path / "copy"))


def test_training_lowers_the_loss(trained):
    folder, _, told = trained
    records = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    assert [record["step"] for record in records] == [10, 20, 30, 40, 50, 60]
    assert records[-1]["loss"] < 0.5 * records[0]["loss"]
    assert {"l1", "l2", "perceptual", "lr", "pictures_per_second"} <= records[0].keys()
    steps = [said for said in told if said[0] == "training"]
    assert [said[1:3] for said in steps] == [(step, 60) for step in range(10, 70, 10)]
    assert [said[3] for said in steps] == records
    assert [said[1:3] for said in told if said[0] != "training"][-1] == (360, 360)


def test_measures_are_of_held_out_pictures(trained, sample_corpus):
    """Against the pictures, coded and decoded one by one."""
    folder, measures, _ = trained
    model = load_image_tokenizer(folder)
    for style in ("A", "C", "all"):
        rows = sample_corpus.picture_rows("validation", **({} if style == "all" else {"source": style}))
        codes, quality = [], []
        for row in rows:
            pixels = sample_corpus.pixels(int(row), 0, 32)
            codes.append(model.encode(torch.from_numpy(pixels)[None]))
            decoded, original = (model.decode(codes[-1]) + 1) / 2, torch.from_numpy(pixels + 1)[None] / 2
            quality.append([psnr(decoded, original).item(), ssim(decoded, original).item()])
        shares = torch.cat(codes).unique(return_counts=True)[1] / torch.cat(codes).numel()
        found = measures[style]
        assert found["pictures"] == len(rows) > 0
        assert [found["psnr"], found["ssim"]] == pytest.approx(np.mean(quality, 0).tolist(), rel=1e-3)
        assert found["codes_used"] == len(shares) / 200
        assert found["code_perplexity"] == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())), rel=1e-3)


def test_stored_codes_are_those_of_the_corpus_views(trained, sample_corpus):
    folder, _, _ = trained
    codes, model = load_image_codes(folder, sample_corpus), load_image_tokenizer(folder)
    assert codes.shape == (90, 4, 64) and codes.dtype == np.uint16
    for row, view in ((0, 0), (17, 1), (89, 3)):
        pixels = torch.from_numpy(sample_corpus.pixels(row, view, 32))
        # Sums of another batch size may round otherwise, and a value between two levels then goes to the other.
        assert (model.encode(pixels[None])[0].numpy() == codes[row, view]).mean() > 0.95


def test_the_sheet_has_originals_over_reconstructions(trained, sample_corpus):
    sheet = Image.open(trained[0] / SHEET)
    assert sheet.size == (16 * 32, 2 * 2 * 32)  # two styles
    row = sample_corpus.picture_rows("validation", source="A")[0]
    original = (sample_corpus.pixels(int(row), 0, 32).transpose(1, 2, 0) + 1) * 127.5
    assert np.abs(np.asarray(sheet)[:32, :32] - original).max() <= 1


def test_the_same_recipe_gives_the_same_tokenizer(trained, sample_corpus, tmp_path):
    again, _ = train(sample_corpus, tmp_path / "again", workers=1)
    assert again == trained[1]
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (trained[0] / WEIGHTS).read_bytes()


def test_without_the_perceptual_loss(sample_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(PerceptualLoss, "forward", None)
    _, told = train(sample_corpus, tmp_path / "plain", steps=4, loss={"perceptual": 0})
    assert "perceptual" not in told[0][3]
    assert json.loads((tmp_path / "plain" / DESCRIPTION).read_text())["feature_network"] is None


def test_a_loss_that_is_not_finite_ends_the_training(sample_corpus, tmp_path):
    with pytest.raises(UserError, match=r"the loss is not finite at step \d+: lower optimizer.lr"):
        train(sample_corpus, tmp_path / "wild", optimizer={"lr": 1e30, "clip": 0}, loss={"perceptual": 0})
    assert [path.name for path in (tmp_path / "wild").iterdir()] == [METRICS]


def test_a_corpus_without_such_pictures_is_refused_at_once(sample_corpus, tmp_path, monkeypatch):
    for split, message in (("test", "split=test: .* has no such pictures"), ("train", "no picture to train on")):
        rows = Corpus.picture_rows
        monkeypatch.setattr(
            Corpus, "picture_rows", lambda *given, empty=split, rows=rows: rows(*given)[: 0 if empty in given else None]
        )
        with pytest.raises(UserError, match=message):
            train(sample_corpus, tmp_path / split, split="test")
        monkeypatch.undo()


def test_views_are_a_pure_function_of_seed_and_position(sample_corpus):
    views, again = (RandomViews(sample_corpus, recipe(sample_corpus)) for _ in range(2))
    other = RandomViews(sample_corpus, recipe(sample_corpus, seed=2))
    assert torch.equal(views[41], again[41]) and not torch.equal(views[41], other[41])
    assert views[3].shape == (3, 32, 32) and views[3].min() >= -1 and views[3].max() <= 1
    drawn = [views.view(position) for position in range(400)]
    assert all(0.75 <= view.scale <= 1.05 and max(abs(view.right), abs(view.down)) <= 0.06 for view in drawn)
    assert 0.4 < np.mean([view.mirrored for view in drawn]) < 0.6


def test_an_epoch_is_every_training_picture_once(sample_corpus, monkeypatch):
    views = RandomViews(sample_corpus, recipe(sample_corpus))
    seen, picture = [], sample_corpus.picture
    monkeypatch.setattr(sample_corpus, "picture", lambda row: seen.append(row) or picture(row))
    size = len(views.rows)
    for position in range(2 * size):
        views[position]
    assert sorted(seen[:size]) == sorted(seen[size:]) == sample_corpus.picture_rows("train").tolist()
    assert seen[:size] != seen[size:]


def test_fixed_views_are_the_corpus_own(sample_corpus):
    views = FixedViews(sample_corpus, [5, 7], 32)
    assert len(views) == 8
    assert np.array_equal(views[6].numpy(), sample_corpus.pixels(7, 2, 32))


def test_the_perceptual_distance(sample_corpus):
    distance = PerceptualLoss(sample_corpus.feature_network)
    a, b = (torch.from_numpy(sample_corpus.pixels(row, 0, 32))[None] for row in (0, 40))
    assert distance(a, a) == 0
    near, far = distance(a + 0.02 * torch.randn(a.shape), a), distance(b, a)
    assert 0 < near < far < 4  # of unit vectors
    image = b.clone().requires_grad_()
    distance(image, a).backward()
    assert image.grad is not None and image.grad.abs().sum() > 0
    assert not any(weight.requires_grad for weight in distance.parameters())


def refusal(load, *arguments):
    with pytest.raises(UserError) as error:
        load(*arguments)
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    return message


def describe(folder, **values):
    path = folder / DESCRIPTION
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def sealed(folder, file, **values):
    """Say that a file is as it should be: a checksum finds damage, not what somebody made up."""
    key = {WEIGHTS: "weights", CODES: "codes"}[file]
    describe(folder, **{key: image_folder.sha256_of(folder / file)}, **values)


def test_damaged_weights_are_refused(copy):
    path = copy / WEIGHTS
    whole = path.read_bytes()
    path.write_bytes(whole[:-4] + b"abcd")
    assert f"{path}: damaged" in refusal(load_image_tokenizer, copy)
    path.write_bytes(whole[:100])
    sealed(copy, WEIGHTS)
    assert f"{path}: not the weights" in refusal(load_image_tokenizer, copy)
    path.unlink()
    assert f"{path}: cannot be read (No such file" in refusal(load_image_tokenizer, copy)


def test_strange_weights_are_refused(copy):
    weights = load_file(copy / WEIGHTS)
    name = next(iter(weights))
    for changed in ({}, weights | {"more": torch.zeros(1)}, weights | {name: torch.zeros(2, 2)}):
        save_file(changed, copy / WEIGHTS)
        sealed(copy, WEIGHTS)
        assert "not the weights that image_tokenizer.json describes" in refusal(load_image_tokenizer, copy)
    save_file(weights | {name: weights[name].half()}, copy / WEIGHTS)
    sealed(copy, WEIGHTS)
    assert f"{name} is torch.float16, not float32" in refusal(load_image_tokenizer, copy)


def test_strange_descriptions_are_refused(copy, tmp_path):
    assert "no image tokenizer there; `m6 image-tokenizer` trains one" in refusal(load_image_tokenizer, tmp_path)
    whole = (copy / DESCRIPTION).read_text()
    model = json.loads(whole)["recipe"]["model"]
    recipe = json.loads(whole)["recipe"]
    describe(copy, recipe=recipe | {"model": model | {"widths": [10**7, 10**7]}})
    assert "not the weights" in refusal(load_image_tokenizer, copy)  # and no memory is taken for it
    misspelt, impossible = whole.replace('"weights"', '"wieghts"'), whole.replace('"patch": 4', '"patch": 5')
    assert whole not in (misspelt, impossible)
    for text in ("", "[]", "[" * 10**5, misspelt, impossible):
        (copy / DESCRIPTION).write_text(text)
        assert refusal(load_image_tokenizer, copy).startswith(f"{copy / DESCRIPTION}: ")


def test_codes_of_another_corpus_or_shape_are_refused(copy, sample_corpus):
    path, codes = copy / CODES, np.load(copy / CODES)
    for strange in (codes.astype(np.int32), codes[:-1], codes[..., :-1], codes + np.uint16(200)):
        np.save(path, strange)
        sealed(copy, CODES)
        assert "not uint16 [90, 4, 64] of 200 codes" in refusal(load_image_codes, copy, sample_corpus)
    pickled = io.BytesIO()
    np.save(pickled, np.array([Hostile()], dtype=object))
    path.write_bytes(pickled.getvalue())
    assert f"{path}: damaged" in refusal(load_image_codes, copy, sample_corpus)
    sealed(copy, CODES)
    assert f"{path}: not an array of codes" in refusal(load_image_codes, copy, sample_corpus)
    describe(copy, data="0" * 64)
    assert "of another corpus" in refusal(load_image_codes, copy, sample_corpus)


class Hostile:
    def __reduce__(self):
        return pytest.fail, ("run",)


def test_its_recipes_say_what_is_wrong(sample_corpus):
    path = ROOT / "launch" / "recipes" / "image-tokenizer.yaml"
    for override, message in {
        "model.wdths=[8]": "model.wdths is unknown; did you mean widths?",
        "model.side=66": "model.side=66 is not divisible into cells of 8 px",
        "model.widths=8": "must be a list",
        "views.scale=[1,0.5]": "must be the least, then the most",
        "split=train": "must be one of validation, test",
        "stepss=5": "stepss is unknown; did you mean steps?",
    }.items():
        assert message in refusal(load_image_recipe, path, [override])


def test_the_command(sample_corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(yaml.safe_dump(recipe(sample_corpus, steps=2).model_dump(mode="json")))
    command = ["image-tokenizer", "--recipe", "r.yaml", "--name", "small", "loss.perceptual=0"]
    m6.main(command, standalone_mode=False)
    said = capsys.readouterr().out
    assert "runs/small" in said and "psnr" in said
    assert load_image_tokenizer(Path("runs/small")).config.side == 32
    with pytest.raises(UserError, match="runs/small exists: choose another --name"):
        m6.main(command, standalone_mode=False)
