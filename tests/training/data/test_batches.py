import dataclasses
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from model.bags import ABSENT
from model.config import ModelConfig
from model.contrast import WORTH
from model.m6 import IGNORE, M6
from training.data.batches import WIDTH_MULTIPLE, Collator, StepBatches
from training.data.features import AUGMENTATIONS, IMAGE_SIZE, augmented
from training.data.order import GlobalOrder
from training.data.tasks import TASKS, Row, View
from training.errors import UserError

LAW = settings(deadline=None, derandomize=True, max_examples=30)
BATCH = 24
WEIGHTS = {"caption": 3, "image_denoise": 1, "denoise": 1, "language": 1, "poem": 1, "review": 1}


@pytest.fixture(scope="module")
def shape(sample_corpus):
    vocab = sample_corpus.tokenizer.vocab_size
    return ModelConfig(
        layers=1, hidden=16, ffn=16, heads=2, text_vocab=vocab, image_codes=0, max_positions=100, image_channels=1280
    )


@pytest.fixture(scope="module")
def pixel_shape(shape):
    return dataclasses.replace(shape, image_input="pixels", image_patches=9, image_channels=3 * 8 * 8)


@pytest.fixture(scope="module")
def collate(sample_corpus, shape):
    return Collator(sample_corpus, shape)


@pytest.fixture(scope="module")
def order(sample_corpus):
    return GlobalOrder([TASKS[name](sample_corpus, "train") for name in WEIGHTS], WEIGHTS, BATCH, 96, seed=1)


@pytest.fixture(scope="module")
def expected(order, collate):
    """The rows of a few steps, each collated alone."""
    return {step: sorted(contents(collate([order.row(step * BATCH + place)], 96)) for place in range(BATCH))
            for step in (0, 1, 41)}  # fmt: skip


def contents(batch):
    """What the only row of a batch says, without its padding."""
    return rows_of(batch)[0]


def rows_of(batch):
    rows = []
    for i, length in enumerate(batch["length_B"].tolist()):
        labels = batch["labels_BT"][i]
        assert (labels[length:] == IGNORE).all()
        rows.append((
            batch["source_B"][i].item(), batch["tokens_BT"][i, :length].tolist(), labels[:length].tolist(),
            batch["has_image_B"][i].item(), batch["image_BPC"][i].double().sum().item(),
        ))  # fmt: skip
    return rows


def test_each_position_predicts_the_next_target(collate):
    bos, eos = collate.corpus.tokenizer.bos_id, collate.corpus.tokenizer.eos_id
    batch = collate([Row([50, 51, 52], [60, 61, eos])], 8)
    assert batch["tokens_BT"].tolist() == [[50, 51, 52, bos, 60, 61, 0, 0]]
    assert batch["labels_BT"].tolist() == [[IGNORE, IGNORE, IGNORE, 60, 61, eos, IGNORE, IGNORE]]
    assert batch["source_B"].tolist() == [3] and batch["length_B"].tolist() == [6]
    assert batch["has_image_B"].tolist() == [False] and not batch["image_BPC"].any()


def test_a_row_without_source_or_of_one_target(collate):
    bos = collate.corpus.tokenizer.bos_id
    batch = collate([Row([], [60, 61]), Row([50], [60])], 8)
    assert batch["tokens_BT"][:, :2].tolist() == [[bos, 60], [50, bos]]
    assert batch["labels_BT"][:, :2].tolist() == [[60, 61], [IGNORE, 60]]
    assert batch["length_B"].tolist() == [2, 2] and batch["source_B"].tolist() == [0, 1]


@LAW
@given(width=st.integers(1, 96))
def test_widths_are_rounded_up(collate, width):
    text = collate([], width, 2)["tokens_BT"].shape[1]
    assert text % WIDTH_MULTIPLE == 0 and width <= text < width + WIDTH_MULTIPLE


def test_no_batch_is_wider_than_the_models_positions(collate):
    row = Row([50] * 30, [60] * 67)
    batch = collate([row], 97)
    assert collate.model.max_positions == batch["tokens_BT"].shape[1] == 100
    assert torch.isfinite(M6(collate.model)(batch)["loss_B"]).all()


def test_missing_rows_are_empty_ones(collate):
    row = Row([50], [60, 61], View(3, 1))
    batch = collate([row], 8, size=3)
    assert {tensor.shape[0] for tensor in batch.values()} == {3}
    assert batch["length_B"].tolist() == [3, 0, 0] and batch["has_image_B"].tolist() == [True, False, False]
    assert (batch["labels_BT"][1:] == IGNORE).all() and (batch["tokens_BT"][1:] == 0).all()
    out = M6(collate.model)(batch)
    alone = M6(collate.model)(collate([row], 8))
    torch.testing.assert_close(out["loss_B"], torch.tensor([alone["loss_B"].item(), 0.0, 0.0]))
    assert out["targets_B"].tolist() == [2, 0, 0]


def test_pictures_are_the_stored_features(collate):
    batch = collate([Row([50], [60], View(3, 2)), Row([50], [60])], 8)
    stored = torch.from_numpy(collate.corpus.features[3, 2].astype(np.float32))
    torch.testing.assert_close(batch["image_BPC"][0], stored, rtol=0, atol=0)
    assert batch["has_image_B"].tolist() == [True, False]


@pytest.mark.parametrize("side", [24, IMAGE_SIZE, 300])
def test_pixels_are_the_view_that_the_features_describe(sample_corpus, side):
    for k in range(len(AUGMENTATIONS)):
        pixels = sample_corpus.pixels(5, k, side)
        assert pixels.shape == (3, side, side) and pixels.dtype == np.float32
        assert -1 <= pixels.min() < 0 and pixels.max() == 1  # white at the corners
        seen = np.asarray(augmented(sample_corpus.picture(5).pil(), k, True, side), np.float32)
        np.testing.assert_allclose((pixels.transpose(1, 2, 0) + 1) * 127.5, seen, atol=1e-3)


def test_what_is_not_mirrorable_is_not_mirrored_in_pixels(sample_corpus, monkeypatch):
    picture = sample_corpus.picture(5)
    views = {}
    for mirrorable in (True, False):
        marked = dataclasses.replace(picture, mirrorable=mirrorable, image=half_black())
        monkeypatch.setattr(sample_corpus, "picture", lambda _, marked=marked: marked)
        views[mirrorable] = sample_corpus.pixels(5, 1, 32)
    left, right = slice(None, 16), slice(16, None)
    assert views[True][..., left].mean() > views[True][..., right].mean()
    assert views[False][..., left].mean() < views[False][..., right].mean()


def half_black():
    """PNG: black on the left, white on the right."""
    image = Image.new("RGB", (40, 40), "white")
    image.paste("black", (0, 0, 20, 40))
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


def test_pixels_become_patches(sample_corpus, pixel_shape):
    batch = Collator(sample_corpus, pixel_shape)([Row([50], [60], View(3, 1)), Row([50], [60])], 8)
    assert batch["image_BPC"].shape == (2, 9, 192)
    pixels = sample_corpus.pixels(3, 1, 24)
    centre = batch["image_BPC"][0, 4].reshape(3, 8, 8).numpy()
    np.testing.assert_array_equal(centre, pixels[:, 8:16, 8:16])
    assert torch.isfinite(M6(pixel_shape)(batch)["loss_B"]).all()


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"text_vocab": 16_000}, ["model.text_vocab=16000", "set model.text_vocab=540"]),
        ({"image_channels": 2048}, ["model.image_patches=16", "image_channels=2048", "16 patches of 1280 channels"]),
        ({"image_patches": 9}, ["model.image_patches=9"]),
        ({"image_input": "pixels", "image_channels": 100}, ["image_channels=100", "3·p·p"]),
        ({"image_input": "pixels", "image_channels": 3 * 5}, ["image_channels=15"]),
        ({"image_input": "pixels", "image_channels": 12, "image_patches": 7}, ["model.image_patches=7"]),
        ({"image_input": "pixels", "image_channels": 0}, ["image_channels=0"]),
        ({"image_input": "pixels", "image_channels": 12, "image_patches": 0}, ["model.image_patches=0"]),
    ],
)
def test_a_model_that_cannot_take_the_corpus_is_refused(sample_corpus, shape, changes, keys):
    with pytest.raises(UserError) as error:
        Collator(sample_corpus, dataclasses.replace(shape, **changes))
    assert all(key in str(error.value) for key in keys) and "\n" not in str(error.value)


def ranks(order, collate, micro, world):
    return [StepBatches(order, collate, micro, rank, world) for rank in range(world)]


LAYOUTS = [(micro, world) for world in (1, 2, 3, 4, 6) for micro in (1, 2, 4, 6, 12) if BATCH % (micro * world) == 0]


@pytest.mark.parametrize(("micro", "world"), LAYOUTS)
def test_a_step_is_the_same_rows_on_any_layout(order, collate, expected, micro, world):
    for step, rows in expected.items():
        batches = [rank.step(step) for rank in ranks(order, collate, micro, world)]
        assert {len(own) for own in batches} == {BATCH // (micro * world)}
        assert sorted(row for own in batches for batch in own for row in rows_of(batch)) == rows


@pytest.mark.parametrize(("micro", "world"), LAYOUTS)
def test_a_micro_step_has_one_shape_on_all_ranks(order, collate, micro, world):
    for shared in zip(*(rank.step(3) for rank in ranks(order, collate, micro, world)), strict=True):
        shapes = [{name: tensor.shape for name, tensor in batch.items()} for batch in shared]
        assert all(shape == shapes[0] for shape in shapes)
        assert all(batch["length_B"].max() <= batch["tokens_BT"].shape[1] for batch in shared)


@pytest.mark.parametrize("micro", [2, 4, 6])
def test_rows_that_share_a_micro_batch_do_so_on_any_number_of_ranks(order, collate, micro):
    worlds = [world for world in (1, 2, 3, 4, 6) if BATCH % (micro * world) == 0]
    groups = [
        sorted(rows_of(batch) for rank in ranks(order, collate, micro, world) for batch in rank.step(1))
        for world in worlds
    ]
    assert len(worlds) > 1 and all(group == groups[0] for group in groups)


@pytest.mark.parametrize(("micro", "world"), [(4, 2), (6, 2), (3, 8)])
def test_tasks_are_told_row_by_row(order, collate, micro, world):
    pictured = {"caption", "image_denoise"}
    for rank in ranks(order, collate, micro, world):
        has = torch.cat([batch["has_image_B"] for batch in rank.step(5)]).tolist()
        assert has == [name in pictured for name in rank.tasks(5)]


def test_steps_are_those_asked_for_whatever_was_prepared(order, collate):
    batches = StepBatches(order, collate, 12, 1, 2)
    for step in (7, 8, 9, 12, 8):
        assert [rows_of(batch) for batch in batches.take(step)] == [rows_of(batch) for batch in batches.step(step)]


def test_an_error_in_a_batch_ahead_is_raised(order, collate):
    batches = StepBatches(order, collate, 12, 0, 2)
    batches.take(0)
    batches.collate = None  # the step ahead may or may not be done
    with pytest.raises(TypeError):
        [batches.take(step) for step in (1, 2, 3)]


def test_hidden_tokens_are_predicted_where_they_are_masked(collate):
    mask, bos, eos = (getattr(collate.tokenizer, f"{name}_id") for name in ("mask", "bos", "eos"))
    batch = collate([Row([70, mask, 72, mask], [60, eos], hidden={1: 71, 3: 73}), Row([mask], [], hidden={0: 9})], 8)
    assert batch["tokens_BT"][:, :6].tolist() == [[70, mask, 72, mask, bos, 60], [mask, bos, 0, 0, 0, 0]]
    assert batch["labels_BT"][0].tolist() == [IGNORE, 71, IGNORE, 73, 60, eos, IGNORE, IGNORE]
    assert batch["labels_BT"][1].tolist() == [9, *[IGNORE] * 7]
    assert batch["source_B"].tolist() == [4, 1] and batch["length_B"].tolist() == [6, 2]


def test_rows_with_a_concept_are_summed_up_and_grouped(collate, shape):
    tokenizer = collate.corpus.tokenizer
    grouping = Collator(collate.corpus, shape, block=4)
    pair = [
        Row([], [], View(3, 0), 7, words=[60, 61, 62]),
        Row([50, 51], [], None, 7, words=[9, 8], weights=[0.6, 0.8]),
    ]
    batch = grouping([*pair, Row([50], [60]), *pair, *pair], 8, size=8)
    assert batch["group_B"].tolist() == [0, 0, -1, 0, 0, 1, 1, -1]
    assert batch["concept_B"].tolist() == [7, 7, -1, 7, 7, 7, 7, -1]
    assert batch["tokens_BT"][:2, :3].tolist() == [[tokenizer.embed_id, 0, 0], [50, 51, tokenizer.embed_id]]
    assert batch["length_B"].tolist()[:3] == [1, 3, 2] and batch["source_B"].tolist()[:2] == [0, 2]
    assert (batch["labels_BT"][:2] == IGNORE).all()
    assert batch["words_BW"].shape == (8, 8) and batch["words_BW"][1].tolist() == [9, 8, *[ABSENT] * 6]
    assert (batch["words_BW"][2] == ABSENT).all() and (batch["weights_BW"][[0, 2, 7]] == 0).all()
    torch.testing.assert_close(batch["weights_BW"][1], torch.tensor([0.6, 0.8] + [0] * 6))
    assert batch["words_BW"][0].tolist() == batch["words_BW"][3].tolist() == [60, 61, 62, *[ABSENT] * 5]
    assert M6(shape)(batch)["targets_B"].tolist() == [WORTH, WORTH, 1, WORTH, WORTH, WORTH, WORTH, 0]
