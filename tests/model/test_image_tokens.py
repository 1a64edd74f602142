"""The image tokenizer: codes are vectors, gradients pass the rounding, and windows decode as the whole."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ImageTokenizerConfig
from model.image_tokens import FSQ, Block, ImageTokenizer
from tests.model.samples import randomise_biases

LAW = settings(deadline=None, derandomize=True, max_examples=30)
TINY = ImageTokenizerConfig(side=32, patch=2, widths=(8, 16), blocks=1, levels=(5, 4, 3))
SHAPES = {
    "two grids": TINY,
    "one grid": ImageTokenizerConfig(side=16, patch=4, widths=(8,), blocks=2, levels=(4, 4)),
    "three grids": ImageTokenizerConfig(side=32, patch=2, widths=(8, 8, 8), blocks=2, levels=(2, 3)),
}
levels_drawn = st.lists(st.integers(2, 9), min_size=1, max_size=4).map(tuple)


def lively(config: ImageTokenizerConfig, seed: int = 0) -> ImageTokenizer:
    """A model in which every path weighs enough to be seen."""
    model = ImageTokenizer(config, seed).eval()
    randomise_biases(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Block):
                module.outer.weight.mul_(10)
    return model


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def all_codes(quantise: FSQ) -> torch.Tensor:
    return torch.arange(math.prod(quantise.levels)).view(1, 1, -1)


@LAW
@given(levels_drawn)
def test_codes_and_vectors_are_one_to_one(levels):
    """Against an independent reference: every combination of levels, the first channel running fastest."""
    quantise = FSQ(levels)
    vectors = quantise.vectors(all_codes(quantise))[0, :, 0].T
    expected = [
        [(digit - n // 2) / (n // 2) for digit, n in zip(reversed(digits), levels, strict=True)]
        for digits in itertools.product(*(range(n) for n in reversed(levels)))
    ]
    torch.testing.assert_close(vectors, torch.tensor(expected))


@LAW
@given(levels_drawn)
def test_every_code_can_be_reached_and_is_what_forward_gives(levels):
    quantise = FSQ(levels)
    codes = all_codes(quantise)
    half = torch.tensor([(n - 1) * 1.001 / 2 for n in levels], dtype=torch.float64).view(-1, 1, 1)
    offset = torch.tensor([0.0 if n % 2 else 0.5 for n in levels], dtype=torch.float64).view(-1, 1, 1)
    steps = quantise.vectors(codes).double() * torch.tensor([n // 2 for n in levels]).view(-1, 1, 1)
    # What has to come in for the bound to come to just this level (the inverse of FSQ's formula).
    z = torch.atanh((steps + offset) / half) - torch.atanh(offset / half)
    assert torch.equal(quantise.codes(z), codes.flatten(1))
    torch.testing.assert_close(quantise(z), quantise.vectors(codes))


@LAW
@given(levels_drawn, st.integers(0, 100))
def test_any_value_has_a_code_of_the_book(levels, seed):
    quantise = FSQ(levels)
    z = torch.randn(2, len(levels), 3, 4, generator=torch.Generator().manual_seed(seed)) * 10 ** (seed % 4)
    codes = quantise.codes(z)
    assert codes.dtype == torch.int64 and codes.shape == (2, 12)
    assert codes.min() >= 0 and codes.max() < math.prod(levels)
    torch.testing.assert_close(quantise.vectors(codes.view(2, 3, 4)), quantise(z))
    assert quantise(z).abs().max() <= 1


def test_the_gradient_passes_the_rounding():
    """It is that of the bound alone, without the rounding."""
    z = torch.linspace(-2, 2, 24).view(1, 3, 2, 4).requires_grad_()
    [found] = torch.autograd.grad(FSQ((8, 5, 5))(z).sum(), z)
    half = torch.tensor([3.5, 2.0, 2.0]).view(-1, 1, 1) * 1.001
    offset = torch.tensor([0.5, 0.0, 0.0]).view(-1, 1, 1)
    bounded = torch.tanh(z + torch.atanh(offset / half)) * half - offset
    [expected] = torch.autograd.grad((bounded / torch.tensor([4.0, 2.0, 2.0]).view(-1, 1, 1)).sum(), z)
    torch.testing.assert_close(found, expected)
    assert (found > 0).all()


def test_the_whole_model_learns_through_the_codes():
    model, image = ImageTokenizer(TINY), pictures(2, 3, 32, 32)
    (model(image) - image).square().mean().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in model.parameters())


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_encoding_and_decoding(config):
    model, image = lively(config), pictures(2, 3, config.side, config.side)
    codes = model.encode(image)
    assert codes.shape == (2, config.grid**2) and codes.dtype == torch.int64
    decoded = model.decode(codes)
    assert decoded.shape == image.shape and decoded.abs().max() <= 1
    torch.testing.assert_close(decoded, model(image).clamp(-1, 1))


@torch.no_grad()
def test_codes_are_row_by_row():
    """A change in one cell's px changes codes about its place: a grid of 2 x 4 cells, wide pictures."""
    model = lively(ImageTokenizerConfig(side=16, patch=8, widths=(8,), blocks=1, levels=(9, 9)))
    image = pictures(1, 3, 16, 160)
    changed = image.clone()
    changed[:, :, 8:, 152:] *= -1
    changes = (model.encode(image) != model.encode(changed)).view(2, 20)
    assert changes[1, 19] and not changes[:, :15].any()


@torch.no_grad()
def test_grids_of_any_shape():
    model = lively(TINY)
    codes = model.encode(pictures(1, 3, 20, 48))
    assert codes.shape == (1, 5 * 12)
    assert model.decode(codes, (5, 12)).shape == (1, 3, 20, 48)
    with pytest.raises(ValueError, match="60 codes do not fill a grid of 7 x 7"):
        model.decode(codes)
    with pytest.raises(ValueError, match="20 x 46 px is not of whole cells of 4 px"):
        model.encode(pictures(1, 3, 20, 46))
    for wrong in (-1, 60):
        with pytest.raises(ValueError, match="codes must be from 0 to 59"):
            model.decode(torch.full((1, 4), wrong))


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_windows_decode_as_the_whole(config):
    model = lively(config)
    grid = (3 * model.reach, 2 * model.reach + 5)
    codes = torch.randint(config.codes, (2, grid[0] * grid[1]), generator=torch.Generator().manual_seed(1))
    whole = model.decode(codes, grid)
    for window in (3, model.reach, 1000):
        torch.testing.assert_close(model.decode_windowed(codes, grid, window), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_reach_is_what_a_pixel_depends_on(config):
    """By gradients: up to `reach` cells away, and no less."""
    model, size = lively(config), 2 * ImageTokenizer(config).reach + 3
    vectors = torch.zeros(1, len(config.levels), 1 + size, 1, requires_grad=True)
    decoded = model.decoder(vectors)
    farthest = 0
    for px in range(config.cell):
        [grad] = torch.autograd.grad(decoded[0, :, px].sum(), vectors, retain_graph=True)
        farthest = max(farthest, int(grad[0].abs().sum((0, 2)).nonzero().max()))
    assert farthest <= model.reach <= farthest + 1


@torch.no_grad()
def test_memory_of_windows_does_not_grow_with_the_picture():
    """The largest grid that the decoder is given is a window's."""
    model = lively(TINY)
    seen = []
    model.decoder.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[2:].numel()))
    for side in (32, 64):
        model.decode_windowed(torch.zeros(1, side * side, dtype=torch.int64), window=8)
    assert max(seen) == (8 + 2 * model.reach) ** 2


def test_weights_are_of_the_seed_alone():
    before = torch.get_rng_state()
    first = ImageTokenizer(TINY, 3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)  # nothing is drawn from the numbers that all share
    torch.manual_seed(2)
    again, other = ImageTokenizer(TINY, 3).state_dict(), ImageTokenizer(TINY, 4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if name.endswith("weight"))
    kernels = [tuple(value.flatten()[:4].tolist()) for name, value in first.items() if name.endswith("weight")]
    assert len(set(kernels)) == len(kernels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"side": 60}, "side=60 is not divisible into cells of 8 px"),
        ({"blocks": 0}, "blocks=0: must be at least 1"),
        ({"widths": ()}, "widths=[]: must be channels"),
        ({"levels": (1,)}, "levels=[1]: must be levels"),
        ({"levels": (256, 257)}, "levels=[256, 257]: 65,792 codes are more than 65,536"),
    ],
)
def test_shapes_that_cannot_be_built(settings, message):
    with pytest.raises(ValueError) as error:
        ImageTokenizerConfig(**settings)
    assert str(error.value).startswith(message)


def test_the_sizes_that_recipes_have():
    small = ImageTokenizerConfig()
    assert (small.cell, small.grid, small.codes) == (8, 8, 1000)
    large = ImageTokenizerConfig(side=256, patch=4, widths=(128, 256, 512), levels=(8, 8, 8, 6, 5))
    assert (large.cell, large.grid, large.codes) == (16, 16, 15_360)
