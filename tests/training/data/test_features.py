import io

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.data_sample import draw, random_network
from training.data.features import (
    AUGMENTATIONS,
    CHANNELS,
    IMAGE_SIZE,
    PATCHES,
    EfficientNetLite0,
    PatchFeatures,
    SamePadConv,
    augmented,
    load_published_weights,
    pixels,
)
from training.errors import UserError


@pytest.fixture(scope="module")
def features(sample_corpus):
    return PatchFeatures(sample_corpus.feature_network)


def picture(shape="triangle"):
    return Image.open(io.BytesIO(draw(shape, "#d33")))


def test_size_of_the_published_network():
    assert sum(parameter.numel() for parameter in EfficientNetLite0().parameters()) == 4_652_008


@pytest.mark.parametrize(
    ("size", "kernel", "stride"), [(8, 3, 1), (8, 3, 2), (8, 5, 2), (7, 3, 2), (7, 5, 2), (8, 1, 1)]
)
def test_same_padding_puts_the_odd_pixel_last(size, kernel, stride):
    conv = SamePadConv(1, 1, kernel, stride, bias=False)
    x = torch.randn(1, 1, size, size)
    out = conv(x)
    assert out.shape[-1] == -(-size // stride)
    # By hand: the first window starts `before` pixels outside the image.
    before = max((-(-size // stride) - 1) * stride + kernel - size, 0) // 2
    padded = torch.zeros(size + 2 * kernel, size + 2 * kernel)
    padded[kernel : kernel + size, kernel : kernel + size] = x[0, 0]
    corner = kernel - before
    window = padded[corner : corner + kernel, corner : corner + kernel]
    torch.testing.assert_close(out[0, 0, 0, 0], (window * conv.weight[0, 0]).sum())


def test_images_of_any_size_and_mode(features):
    images = [picture(), picture().resize((300, 40)), picture().convert("L"), Image.new("RGBA", (1, 1))]
    out = features(images)
    assert out.shape == (4, PATCHES, CHANNELS) and out.dtype == torch.float32
    assert torch.isfinite(out).all()


def test_folded_norms_change_nothing():
    network = random_network()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as after training
            for values in (module.weight, module.bias, module.running_mean):
                torch.nn.init.uniform_(values, -0.5, 1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    x = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        before = network.eval()(x)
        network.fold_norms()
        torch.testing.assert_close(network(x), before, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())


def test_patches_are_the_map_row_by_row(features):
    square = augmented(picture(), 0)
    with torch.inference_mode():
        places = features.network.features(pixels([square]))
    assert places.shape == (1, CHANNELS, 7, 7)
    windows = [slice(0, 2), slice(1, 4), slice(3, 6), slice(5, 7)]  # neighbours share one place
    grid = torch.stack([torch.stack([places[..., y, x].mean((2, 3)) for x in windows], -1) for y in windows], -2)
    mean, deviation = (buffer[:, None, None] for buffer in (features.network.mean, features.network.deviation))
    grid = (grid - mean) / deviation
    patches = features([picture()])
    torch.testing.assert_close(patches[0], grid[0].flatten(1).T)


def test_stored_features_are_those_of_the_pictures(sample_corpus, features):
    for row in (0, 17, len(sample_corpus.pictures) - 1):
        item = sample_corpus.picture(row)
        squares = [augmented(item.pil(), k, item.mirrorable) for k in range(len(AUGMENTATIONS))]
        # Rounded to float16 before channels are standardised, which stretches it, and after.
        np.testing.assert_allclose(sample_corpus.features[row], features.of_squares(squares), rtol=2e-3, atol=6e-3)


def test_augmentations_keep_the_object_whole():
    ink = [np.asarray(augmented(picture("square"), k)).mean(-1) < 200 for k in range(len(AUGMENTATIONS))]
    for mask in ink:
        assert not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())
    assert len({mask.tobytes() for mask in ink}) == len(AUGMENTATIONS)


def test_what_reads_differently_in_a_mirror_is_not_mirrored():
    left_half = Image.new("RGB", (64, 64), "white")
    left_half.paste("black", (0, 0, 32, 64))
    for k in range(len(AUGMENTATIONS)):
        dark = np.asarray(augmented(left_half, k, mirrorable=False)).mean(-1) < 128
        assert dark[:, : IMAGE_SIZE // 2].sum() > dark[:, IMAGE_SIZE // 2 :].sum()


def test_damaged_network_file(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    save_file({"fc.bias": torch.zeros(3)}, tmp_path / "other.safetensors")
    for name in ("cut", "other", "missing"):
        with pytest.raises(UserError, match=f"{name}.safetensors"):
            PatchFeatures(tmp_path / f"{name}.safetensors")


def test_published_weights_load_strictly_and_never_run_code():
    state = random_network().state_dict()
    published = io.BytesIO()
    names = {name: ".".join(p if p.isdigit() else f"_{p}" for p in name.split(".")) for name in state}
    torch.save({names[name]: value for name, value in state.items()}, published)
    loaded = load_published_weights(published.getvalue()).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    hostile = io.BytesIO()
    torch.save(Hostile(), hostile)
    with pytest.raises(Exception, match="Weights only load failed"):
        load_published_weights(hostile.getvalue())


class Hostile:
    def __reduce__(self):
        return print, ("run",)
