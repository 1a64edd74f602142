"""An adapted model is the dense one with W + SCALE · A·B in the place of W: in what it says, and in its gradients."""

import dataclasses

import pytest
import torch
from torch import Tensor

from model.adapters import SCALE, merge, names_beside
from model.config import ModelConfig
from model.m6 import M6
from model.parts import ADAPTERS, WHOLE, part_of
from tests.model.samples import DENSE, TINY, gradients, randomise_biases, sample_batch

ADAPTED = dataclasses.replace(TINY, adapter_rank=3)
SHAPES = {
    "experts": ADAPTED,
    "gated": dataclasses.replace(ADAPTED, gated_experts=True),
    "dense": dataclasses.replace(DENSE, adapter_rank=3),
    "shared": dataclasses.replace(ADAPTED, share_layers=True),
    "bags": dataclasses.replace(ADAPTED, bag_width=6),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def adapted_and_dense(shape: ModelConfig) -> tuple[M6, M6]:
    """A model with adapters that say something, and a plain one with their product in its weights."""
    adapted = M6(shape, seed=2)
    randomise_biases(adapted)
    plain = M6(dataclasses.replace(shape, adapter_rank=0), seed=2)
    own = dict(adapted.named_parameters())
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            a, b = (own.get(beside) for beside in names_beside(name))
            weight.copy_(own[name] if a is None else own[name] + SCALE * product(weight, a, b))
    return adapted, plain


def product(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return b @ a if weight.dim() == 2 else a @ b


def loss(model: M6) -> Tensor:
    batch = sample_batch(model.config)
    out = model(batch)
    of_bags = 0.0
    if model.bags:
        x_BS = model.bags(batch["tokens_BT"], batch["source_B"], batch["image_BPC"], batch["has_image_B"])
        asked_BV = model.bags.asked_for(batch["image_BPC"])
        of_bags = x_BS.square().sum() - model.bags.likely_words(x_BS)[:, 3].sum() - asked_BV[:, 5].sum()
    return out["loss_B"].sum() + out["auxiliary"] + of_bags


def freeze(model: M6, *trained: str) -> M6:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in trained)
    return model


@each_shape
def test_an_adapted_model_is_the_dense_one_with_the_product_added(shape: ModelConfig) -> None:
    adapted, dense = adapted_and_dense(shape)
    assert loss(adapted).item() == pytest.approx(loss(dense).item(), rel=1e-5)
    loss(adapted).backward()
    loss(dense).backward()
    found, of_dense = gradients(adapted), gradients(dense)
    own = dict(adapted.named_parameters())
    beside = 0
    for name, gradient in of_dense.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4)
        a, b = names_beside(name)
        if a in own:
            beside += 2
            left, right = (own[b], own[a]) if gradient.dim() == 2 else (own[a], own[b])
            of_left, of_right = (found[b], found[a]) if gradient.dim() == 2 else (found[a], found[b])
            torch.testing.assert_close(of_left, SCALE * gradient @ right.mT, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(of_right, SCALE * left.mT @ gradient, rtol=1e-3, atol=1e-4)
    assert beside == sum(part_of(name) == ADAPTERS for name in own) > 0


@each_shape
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same_one(shape: ModelConfig) -> None:
    whole, _ = adapted_and_dense(shape)
    loss(whole).backward()
    for trained in ({ADAPTERS}, {"norms", ADAPTERS}, {"routers", "embeddings"} if shape.experts else {"image"}):
        frozen = freeze(adapted_and_dense(shape)[0], *trained)
        loss(frozen).backward()
        found = gradients(frozen)
        assert {part_of(name) for name in found} == trained
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, gradients(whole)[name], rtol=1e-4, atol=1e-6)


@each_shape
def test_a_new_adapter_changes_nothing(shape: ModelConfig) -> None:
    plain = M6(dataclasses.replace(shape, adapter_rank=0), seed=5)
    assert torch.equal(loss(M6(shape, seed=5)), loss(plain))


@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 6)], ids=["a Linear's", "experts'"])
@pytest.mark.parametrize("pieces", [[1000], [1] * 100, [13, 2, 29, 40]])
def test_slices_are_merged_as_the_whole_is(shape: tuple[int, ...], pieces: list[int]) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    *before, height, width = shape
    a = torch.randn(2, width) if not before else torch.randn(*before, height, 2)
    b = torch.randn(height, 2) if not before else torch.randn(*before, 2, width)
    a, b = a.double(), b.double()
    asked = []

    def read(flat: Tensor, first: int, count: int) -> Tensor:
        asked.append(count)
        return flat[first : first + count]

    merged, first = [], 0
    for piece in cut(weight, pieces):
        values = piece.clone()
        merge(values, first, shape, 2, lambda n, m: read(a.flatten(), n, m), lambda n, m: read(b.flatten(), n, m))
        merged.append(values)
        first += values.numel()
    expected = weight + SCALE * product(weight, a, b)
    torch.testing.assert_close(torch.cat(merged).view(shape), expected)
    assert max(asked) <= max(a[0].numel() if before else a.numel(), b[0].numel() if before else b.numel())


def cut(weight: Tensor, pieces: list[int]) -> list[Tensor]:
    """A flat weight in pieces of these sizes, the last as long as what is left."""
    flat, found = weight.flatten(), []
    for size in pieces:
        found.append(flat[:size])
        flat = flat[size:]
    return [piece for piece in (*found, flat) if piece.numel()]


def test_every_parameter_is_of_a_part_that_is_counted() -> None:
    for shape in (*SHAPES.values(), dataclasses.replace(ADAPTED, bag_width=5)):
        with torch.device("meta"):
            model, counts = M6(shape), shape.parameter_counts()
        for part in WHOLE:
            own = sum(p.numel() for name, p in model.named_parameters() if part_of(name) == part)
            assert own == getattr(counts, part), part
