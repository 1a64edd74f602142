"""Pictures to patch features: a frozen EfficientNet-Lite0, as M6 feeds a frozen ResNet's patch features.

M6 (arXiv 2103.00823) cuts an image into 4 x 4 patches and describes each by a pre-trained CNN. Here these are
means over the last feature map of EfficientNet-Lite0 at the 224 x 224 pixels that it was trained on, whose 7 x 7
places 4 x 4 windows share (Tan and Le 2019; the Lite variants have no squeeze-and-excitation and use ReLU6). At
128 pixels, where the map itself is 4 x 4, far less is found by them. The network never trains: features are
computed once a picture.
"""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from training.data.images import on_white
from training.errors import UserError

IMAGE_SIZE = 224
GRID = 4  # patches along a side
PATCHES = GRID * GRID
CHANNELS = 1280

# (repeats, kernel, stride, expansion, output channels) of the inverted-bottleneck stages.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM_CHANNELS = 32
_CLASSES = 1000
_BATCH_NORM_EPS = 1e-3
# The Lite networks were trained on pixels scaled as (value - 127) / 128.
_PIXEL_MEAN, _PIXEL_SCALE = 127.0, 128.0


class SamePadConv(nn.Conv2d):
    """Convolution with ceil(input / stride) outputs, padded as TensorFlow does: the odd pixel goes last."""

    def forward(self, x: Tensor) -> Tensor:
        total_h, total_w = (
            max((-(-size // stride) - 1) * stride + kernel - size, 0)
            for size, kernel, stride in zip(x.shape[2:], self.kernel_size, self.stride, strict=True)
        )
        before = (total_h // 2, total_w // 2)
        if total_h % 2 or total_w % 2:
            x = F.pad(x, (0, total_w % 2, 0, total_h % 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, before, groups=self.groups)


def _conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> SamePadConv:
    return SamePadConv(inputs, outputs, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_BATCH_NORM_EPS)


class InvertedBottleneck(nn.Module):
    """Widen by 1 x 1, filter by depth, narrow by 1 x 1 (Sandler et al. 2018); residual where shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        hidden = inputs * expansion
        self.expands = expansion > 1
        self.residual = stride == 1 and inputs == outputs
        if self.expands:
            self.expand_conv, self.bn0 = _conv(inputs, hidden), _norm(hidden)
        self.depthwise_conv, self.bn1 = _conv(hidden, hidden, kernel, stride, groups=hidden), _norm(hidden)
        self.project_conv, self.bn2 = _conv(hidden, outputs), _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        hidden = F.relu6(self.bn1(self.depthwise_conv(hidden)))
        hidden = self.bn2(self.project_conv(hidden))
        return hidden + x if self.residual else hidden


class EfficientNetLite0(nn.Module):
    """The ImageNet classifier; `patches` is what M6 sees, `forward` gives logits [n, 1000]."""

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem, self.bn0 = _conv(3, _STEM_CHANNELS, kernel=3, stride=2), _norm(_STEM_CHANNELS)
        blocks, channels = [], _STEM_CHANNELS
        for repeats, kernel, stride, expansion, outputs in _STAGES:
            for repeat in range(repeats):
                blocks.append(InvertedBottleneck(channels, outputs, kernel, stride if repeat == 0 else 1, expansion))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.conv_head, self.bn1 = _conv(channels, CHANNELS), _norm(CHANNELS)
        self.fc = nn.Linear(CHANNELS, _CLASSES)
        # Of each channel over the corpus' training pictures; `patches` takes them out.
        self.register_buffer("mean", torch.zeros(CHANNELS))
        self.register_buffer("deviation", torch.ones(CHANNELS))

    def patches(self, x: Tensor) -> Tensor:
        """[n, 3, h, w] of normalised pixels -> [n, 16, 1280], row by row, each channel standardised.

        ReLU6 leaves channels with means far from zero, beside which what tells pictures apart is small.
        """
        patches = F.adaptive_avg_pool2d(self.features(x), GRID)
        return (patches.flatten(2).transpose(1, 2) - self.mean) / self.deviation

    def stem(self, x: Tensor) -> Tensor:
        """[n, 3, h, w] of normalised pixels -> [n, 32, h/2, w/2], the blocks' input."""
        return F.relu6(self.bn0(self.conv_stem(x)))

    def features(self, x: Tensor) -> Tensor:
        """[n, 3, h, w] of normalised pixels -> [n, 1280, h/32, w/32]."""
        return F.relu6(self.bn1(self.conv_head(self.blocks(self.stem(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))

    def fold_norms(self) -> None:
        """Multiply the normalisations into the convolutions before them, for good: a third less time in evaluation."""
        pairs: list[tuple[nn.Module, str, str]] = [(self, "conv_stem", "bn0"), (self, "conv_head", "bn1")]
        for block in self.blocks:
            pairs += [(block, "expand_conv", "bn0")] if block.expands else []
            pairs += [(block, "depthwise_conv", "bn1"), (block, "project_conv", "bn2")]
        for module, conv, norm in pairs:
            setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
            setattr(module, norm, nn.Identity())


@dataclass(frozen=True)
class Augmentation:
    """A fixed view of a picture on its white square: scaled, moved by a fraction of the side, mirrored."""

    scale: float = 1.0
    right: float = 0.0
    down: float = 0.0
    mirrored: bool = False


# Scales stay close to 1 and shifts small, so that nothing of the object leaves the square.
AUGMENTATIONS = (
    Augmentation(),
    Augmentation(scale=0.94, mirrored=True),
    Augmentation(scale=0.85, right=0.05, down=-0.05),
    Augmentation(scale=0.88, right=-0.04, down=0.05, mirrored=True),
)


def augmented(image: Image.Image, k: int, mirrorable: bool = True, square_side: int = IMAGE_SIZE) -> Image.Image:
    """The k-th fixed view of an RGB image as a white square of `square_side` pixels; 0 is the plain one."""
    return placed(image, AUGMENTATIONS[k], mirrorable, square_side)


def placed(image: Image.Image, view: Augmentation, mirrorable: bool, square_side: int) -> Image.Image:
    """A view of an RGB image as a white square of `square_side` pixels; what leaves the square is cut off.

    A picture that means something else in a mirror (an arrow, a letter) is not mirrored if not `mirrorable`.
    """
    if view.mirrored and mirrorable:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    ratio = view.scale * square_side / max(image.size)
    width, height = (max(1, round(side * ratio)) for side in image.size)
    square = Image.new("RGB", (square_side, square_side), "white")
    corner = (
        round((square_side - width) / 2 + view.right * square_side),
        round((square_side - height) / 2 + view.down * square_side),
    )
    square.paste(image.resize((width, height), Image.Resampling.BICUBIC), corner)
    return square


def as_array(square: Image.Image) -> np.ndarray:
    """An RGB image as float32 [3, side, side] in [-1, 1]."""
    return np.asarray(square, np.float32).transpose(2, 0, 1) / 127.5 - 1


def as_picture(pixels: Tensor) -> Image.Image:
    """[3, height, width] in [-1, 1], as `as_array` gives it -> the RGB image."""
    return Image.fromarray(((pixels.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy())


def load_published_weights(pickled: bytes) -> EfficientNetLite0:
    """The network from the state dict of the published package, read without unpickling objects."""
    state = torch.load(io.BytesIO(pickled), map_location="cpu", weights_only=True)
    network = EfficientNetLite0()
    own = {name: buffer for name, buffer in network.named_buffers() if name in ("mean", "deviation")}
    network.load_state_dict(own | {_own_name(name): tensor for name, tensor in state.items()}, strict=True)
    return network.eval()


def _own_name(published: str) -> str:
    """`_blocks.3._expand_conv.weight` -> `blocks.3.expand_conv.weight`."""
    return ".".join(part.removeprefix("_") for part in published.split("."))


class PatchFeatures:
    """The frozen network at work: RGB images of any size -> float32 [n, 16, 1280], on the CPU.

    `path` is a safetensors file of `EfficientNetLite0`; raises UserError if it is missing or is not one.
    """

    def __init__(self, path: Path | str):
        self.network = EfficientNetLite0().eval()
        try:
            weights = Path(path).read_bytes()
            self.network.load_state_dict(load(weights), strict=True)
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: no feature network ({reason}); run `m6 data fetch`") from error
        self.network.fold_norms()
        self.sha256 = hashlib.sha256(weights).hexdigest()

    def __call__(self, images: list[Image.Image]) -> Tensor:
        return self.of_squares([augmented(on_white(image), 0) for image in images])

    @torch.inference_mode()
    def of_squares(self, squares: list[Image.Image]) -> Tensor:
        """Squares of IMAGE_SIZE, as `augmented` makes them -> float32 [n, 16, 1280], patches row by row."""
        return self.network.patches(pixels(squares)).contiguous()


def pixels(squares: list[Image.Image]) -> Tensor:
    """RGB images of one size -> [n, 3, h, w], scaled as the network was trained to see them."""
    array = np.stack([np.asarray(square, dtype=np.float32) for square in squares])
    return normalised(torch.from_numpy(array)).permute(0, 3, 1, 2)


def normalised(values: Tensor) -> Tensor:
    """Pixel values from 0 to 255, scaled as the network was trained to see them."""
    return (values - _PIXEL_MEAN) / _PIXEL_SCALE
