"""The whole model: losses, sharing, recomputation, pictures and batches of every kind."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.m6 import IGNORE, M6
from model.packing import Packing
from model.vision import patchify
from tests.model.samples import DENSE, TINY, gradients, randomise_biases, sample_batch

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # fp32, sums in another order
CONFIGS = {
    "dense": DENSE,
    "dense gated": dataclasses.replace(DENSE, gated_experts=True),
    "prototypes": TINY,
    "top-k 1x": dataclasses.replace(TINY, routing="top-k", capacity="1x", balance_loss=0.1, z_loss=0.01),
    "shared": dataclasses.replace(TINY, share_layers=True, layers=3, balance_loss=0.1),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def build(config: ModelConfig) -> M6:
    model = M6(config)
    randomise_biases(model)
    return model


def without_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if key != "labels_BT"}


def text_logits(model: M6, batch: dict[str, Tensor]) -> Tensor:
    """Logits [B, T, V] of all text positions."""
    x_BND = model.hidden_states(**without_labels(batch))[0]
    return x_BND[:, model.config.image_patches :] @ model.vocabulary.weight.T


def step(model: M6, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    out = model(batch)
    (out["loss_B"].sum() + out["auxiliary"]).backward()
    return out, gradients(model)


@every_config
def test_shapes_and_counts(config: ModelConfig):
    model, batch = build(config), sample_batch(config)
    out, grads = step(model, batch)
    rows = len(batch["tokens_BT"])
    assert out["loss_B"].shape == out["targets_B"].shape == (rows,)
    assert out["loss_B"].dtype == out["auxiliary"].dtype == torch.float32 and out["auxiliary"].shape == ()
    assert out["counts"].shape == (config.layers, 2, 2, config.experts)
    images = config.image_patches * int(batch["has_image_B"].sum())
    texts = int(batch["length_B"].sum())
    assert out["tokens"] == images + texts
    if config.experts:
        wanted = out["counts"][:, :, 0].sum(-1)
        assert wanted.tolist() == [[config.k * images, config.k * texts]] * config.layers
    assert grads.keys() == dict(model.named_parameters()).keys()
    assert all(value.isfinite().all() and value.any() for value in grads.values())


@every_config
def test_losses_are_the_naive_cross_entropy_of_each_row(config: ModelConfig):
    model, batch = build(config), sample_batch(config)
    out = model(batch)
    log_BTV = text_logits(model, batch).log_softmax(-1)
    for row, labels in enumerate(batch["labels_BT"].tolist()):
        terms = [-log_BTV[row, place, label].item() for place, label in enumerate(labels) if label != IGNORE]
        assert out["targets_B"][row] == len(terms)
        assert out["loss_B"][row].item() == pytest.approx(sum(terms), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("targets", [0, 1, 64, 65])
def test_any_number_of_targets_has_its_loss_and_gradients(targets: int):
    model, batch = build(TINY), sample_batch(TINY, rows=10)
    labels_S = torch.full((batch["tokens_BT"].numel(),), IGNORE)
    labels_S[:targets] = 3
    batch["labels_BT"] = labels_S.view_as(batch["tokens_BT"])
    out, grads = step(model, batch)
    loss = out["loss_B"].sum()
    naive = torch.nn.functional.cross_entropy(
        text_logits(model, batch).flatten(0, 1), labels_S, ignore_index=IGNORE, reduction="sum"
    )
    torch.testing.assert_close(loss, naive, **TOLERANCE)
    assert out["targets_B"].sum() == targets
    # All ranks must send the same gradients, also one without a target.
    assert grads.keys() == dict(model.named_parameters()).keys()
    assert targets > 0 or not any(value.any() for value in grads.values())


@every_config
def test_logits_without_labels_are_those_of_the_last_text_position(config: ModelConfig):
    model, batch = build(config).eval(), sample_batch(config)
    out = model(without_labels(batch))
    expected = text_logits(model, batch)[torch.arange(5), batch["length_B"] - 1]
    assert set(out) == {"logits_BV"}
    torch.testing.assert_close(out["logits_BV"], expected, **TOLERANCE)


@every_config
def test_rows_of_all_kinds_do_not_touch_each_other(config: ModelConfig):
    model, batch = build(config).eval(), sample_batch(config)
    together = model(batch)["loss_B"]
    alone = [model({key: value[row : row + 1] for key, value in batch.items()})["loss_B"] for row in range(5)]
    torch.testing.assert_close(together, torch.cat(alone), **TOLERANCE)


def test_batches_of_every_kind_run_the_same_modules_and_have_the_same_gradients():
    """All ranks must run the same modules in the same order, whatever their rows are."""
    model, batch = build(TINY), sample_batch(TINY)
    called: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    orders = []
    for has_image in (batch["has_image_B"], torch.ones(5, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)):
        called.clear()
        _, grads = step(model, batch | {"has_image_B": has_image})
        orders.append(list(called))
        assert grads.keys() == dict(model.named_parameters()).keys()
        assert grads["image.project.weight"].any() == has_image.any()
    assert "image.project" in orders[0] and orders[0] == orders[1] == orders[2]


@every_config
@pytest.mark.parametrize("training", [True, False])
def test_recomputation_changes_nothing(config: ModelConfig, training: bool):
    model, batch = build(config).train(training), sample_batch(config)
    plain = step(model, batch)
    model.recompute = True
    recomputed = step(model, batch)
    for before, after in zip(plain, recomputed, strict=True):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_recomputation_is_off_without_gradients():
    model, batch = build(TINY), sample_batch(TINY)
    model.recompute = True
    with torch.no_grad():
        assert model(batch)["loss_B"].grad_fn is None


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", [DENSE, TINY], ids=["dense", "experts"])
def test_a_shared_layers_gradient_is_the_sum_over_its_uses(kind: ModelConfig, recompute: bool):
    shared = build(dataclasses.replace(kind, share_layers=True, layers=3))
    own = copy.deepcopy(shared)
    own.config = dataclasses.replace(kind, layers=3)
    own.layers = torch.nn.ModuleList(copy.deepcopy(shared.layers[0]) for _ in range(3))
    shared.recompute = recompute
    batch = sample_batch(kind)
    out, grads = step(shared, batch)
    own_out, own_grads = step(own, batch)
    assert torch.equal(out["loss_B"], own_out["loss_B"]) and torch.equal(out["counts"], own_out["counts"])
    for name, value in grads.items():
        copies = [name.replace("layers.0.", f"layers.{number}.") for number in range(3)]
        expected = sum(own_grads[each] for each in copies) if name.startswith("layers") else own_grads[name]
        torch.testing.assert_close(value, expected, **TOLERANCE)
        if name.startswith("layers"):
            assert not torch.allclose(value, 3 * own_grads[name], **TOLERANCE)


def test_the_model_equals_its_parts_written_out():
    """Pre-norm layers over image and text embeddings, each with its position and segment; dense, one row."""
    model, batch = build(DENSE), sample_batch(DENSE, rows=1)
    batch["length_B"][:] = batch["tokens_BT"].shape[1]
    source, n = int(batch["source_B"]), DENSE.image_patches + batch["tokens_BT"].shape[1]
    image, position, segment = model.image, model.position.weight, model.segment.weight
    picture = image.norm(image.project(batch["image_BPC"][0])) + image.position.weight + segment[0]
    words = model.vocabulary.weight[batch["tokens_BT"][0]] + position[: n - DENSE.image_patches]
    words = words + torch.where(torch.arange(len(words))[:, None] < source, segment[1], segment[2])
    x_ND = torch.cat((picture, words))
    mask_NN = torch.ones(n, n).tril().bool()
    mask_NN[:, : DENSE.image_patches + source] = True
    everything = Packing.of(torch.ones(1, n, dtype=torch.bool), x_ND)
    for layer in model.layers:
        x_ND = x_ND + layer.attention(layer.attention_norm(x_ND), mask_NN[None, None], everything)
        inner = torch.nn.functional.gelu(layer.feed_forward.inner(layer.feed_forward_norm(x_ND)))
        x_ND = x_ND + layer.feed_forward.outer(inner)
    torch.testing.assert_close(model.hidden_states(**without_labels(batch))[0][0], model.norm(x_ND), **TOLERANCE)


def test_auxiliary_losses_are_summed_over_layers_and_tokens():
    config = CONFIGS["top-k 1x"]
    model, batch = build(config), sample_batch(config)
    seen = []
    for layer in model.layers:
        layer.moe.register_forward_hook(lambda module, inputs, output: seen.append(output[1]))
    auxiliary = model(batch)["auxiliary"]
    assert len(seen) == config.layers and auxiliary > 0
    torch.testing.assert_close(auxiliary, sum(seen))


def test_a_text_model_needs_no_patches():
    config = dataclasses.replace(TINY, image_patches=0)
    model, batch = build(config), sample_batch(config)
    assert model(batch)["loss_B"].isfinite().all()


@pytest.mark.parametrize("patches", [1, 4, 16])
def test_patches_are_squares_of_the_picture_row_by_row(patches: int):
    image_BcHW = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    cut_BPC = patchify(image_BcHW, patches)
    side = round(patches**0.5)
    p = 8 // side
    assert cut_BPC.shape == (2, patches, 3 * p * p)
    again = torch.zeros_like(image_BcHW)
    for number in range(patches):
        top, left = number // side * p, number % side * p
        again[:, :, top : top + p, left : left + p] = cut_BPC[:, number].view(2, 3, p, p)
    assert torch.equal(again, image_BcHW)


@pytest.mark.parametrize(("height", "patches"), [(8, 5), (8, 9), (7, 4)])
def test_pictures_that_cannot_be_cut_are_refused(height: int, patches: int):
    with pytest.raises(ValueError, match=f"a picture of {height} px cannot be cut into {patches} square patches"):
        patchify(torch.zeros(1, 3, height, height), patches)


def test_pixels_go_through_the_model():
    config = dataclasses.replace(TINY, image_input="pixels", image_channels=3 * 4 * 4)
    model, batch = build(config), sample_batch(config)
    pictures = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    batch["image_BPC"] = patchify(pictures, config.image_patches)
    loss_B = model(batch)["loss_B"]
    turned = model(batch | {"image_BPC": patchify(pictures.flip(-1), config.image_patches)})["loss_B"]
    assert loss_B.isfinite().all()
    changed_B = batch["has_image_B"] & (out_targets(batch) > 0)
    torch.testing.assert_close(turned[~changed_B], loss_B[~changed_B], **TOLERANCE)
    assert ((turned - loss_B)[changed_B].abs() > 1e-3).all()


def out_targets(batch: dict[str, Tensor]) -> Tensor:
    return (batch["labels_BT"] != IGNORE).sum(1)
