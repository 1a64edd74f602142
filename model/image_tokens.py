"""Pictures <-> discrete codes: a convolutional autoencoder with finite scalar quantisation.

M6 draws by writing the codes of such a tokenizer (M6, arXiv 2103.00823, used a VQGAN). The quantiser is FSQ (Mentzer
et al. 2023, arXiv 2309.15505): each channel of the narrow middle is bounded and rounded to a few levels, and a code
is the number that these digits spell. There is no codebook to learn, hence none that collapses.

Everything between is convolution, and nothing looks at the picture as a whole, so that any grid of codes can be
decoded, and a large one window by window.

Shape suffixes: B pictures, c colours (3), H height and W width in px, D channels, h rows and w columns of a grid,
P = h * w codes row by row, L quantised channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ImageTokenizerConfig
from model.initialise import fill_normal

# FSQ bounds a channel of n levels to a little more than (n - 1) / 2, or its outermost levels could hardly be reached.
SLACK = 1e-3


class Conv(nn.Conv2d):
    """A convolution that keeps the grid's size and draws its weight from its key; the bias starts at zero."""

    def __init__(self, inputs: int, outputs: int, size: int, *key: object, gain: float = 1.0):
        super().__init__(inputs, outputs, size, padding=size // 2, bias=False)
        fill_normal(self.weight, gain / math.sqrt(inputs * size * size), *key)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def reset_parameters(self) -> None:
        """Nothing: the constructor fills the weight, once."""


class Block(nn.Module):
    """Two 3 x 3 convolutions added to what comes in (He et al. 2016), without normalisation.

    Statistics over the picture would make a window decode otherwise than the whole. The second convolution starts
    small instead, so that the sum does not grow with depth (Zhang et al. 2019, Fixup).
    """

    reach = 2  # cells of its grid that an output depends on, to each side

    def __init__(self, width: int, *key: object):
        super().__init__()
        self.inner = Conv(width, width, 3, *key, "inner", gain=math.sqrt(2))
        self.outer = Conv(width, width, 3, *key, "outer", gain=0.1)

    def forward(self, x_BDhw: Tensor) -> Tensor:
        return x_BDhw + self.outer(F.silu(self.inner(F.silu(x_BDhw))))


class FSQ(nn.Module):
    """Finite scalar quantisation (arXiv 2309.15505, section 3): no weights, and every code stands for one vector."""

    def __init__(self, levels: tuple[int, ...]):
        super().__init__()
        self.levels = levels

    def forward(self, z_BLhw: Tensor) -> Tensor:
        """Quantised to the grid of levels, in [-1, 1]; the gradient passes as if nothing had been rounded."""
        bounded = self._bound(z_BLhw)
        return (bounded + (bounded.round() - bounded).detach()) / self._half(z_BLhw)

    def codes(self, z_BLhw: Tensor) -> Tensor:
        """int64 [B, P]: the number whose digits are the levels, the first channel the least."""
        digits_BLhw = self._bound(z_BLhw).round() + self._half(z_BLhw)
        return (digits_BLhw.long() * self._places(z_BLhw.device)).sum(1).flatten(1)

    def vectors(self, codes_Bhw: Tensor) -> Tensor:
        """float32 [B, L, h, w]: what `forward` gives for pictures of these codes."""
        levels = torch.tensor(self.levels, device=codes_Bhw.device).view(-1, 1, 1)
        digits_BLhw = codes_Bhw[:, None] // self._places(codes_Bhw.device) % levels
        half = self._half(torch.empty(0, device=codes_Bhw.device))
        return (digits_BLhw - half) / half

    def _bound(self, z_BLhw: Tensor) -> Tensor:
        """In fp32, to where rounding gives each of a channel's levels, from -floor(n / 2)."""
        levels = torch.tensor(self.levels, device=z_BLhw.device).view(-1, 1, 1)
        half = (levels - 1) * (1 + SLACK) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        return torch.tanh(z_BLhw.float() + torch.atanh(offset / half)) * half - offset

    def _half(self, like: Tensor) -> Tensor:
        return torch.tensor([n // 2 for n in self.levels], dtype=torch.float32, device=like.device).view(-1, 1, 1)

    def _places(self, device: torch.device) -> Tensor:
        values = [math.prod(self.levels[:channel]) for channel in range(len(self.levels))]
        return torch.tensor(values, device=device).view(-1, 1, 1)


class Encoder(nn.Module):
    """Pictures -> values to be quantised: patches, then residual blocks on ever coarser grids."""

    def __init__(self, config: ImageTokenizerConfig, *key: object):
        super().__init__()
        widths, patch = config.widths, config.patch
        layers: list[nn.Module] = [nn.PixelUnshuffle(patch), Conv(3 * patch * patch, widths[0], 3, *key, "patches")]
        for number, width in enumerate(widths):
            if number:
                layers += [nn.PixelUnshuffle(2), Conv(4 * widths[number - 1], width, 1, *key, number, "down")]
            layers += [Block(width, *key, number, block) for block in range(config.blocks)]
        layers += [nn.SiLU(), Conv(widths[-1], len(config.levels), 1, *key, "values")]
        self.layers = nn.Sequential(*layers)

    def forward(self, image_BcHW: Tensor) -> Tensor:
        return self.layers(image_BcHW)


class Decoder(nn.Module):
    """Quantised values -> pictures: the encoder, turned about."""

    def __init__(self, config: ImageTokenizerConfig, *key: object):
        super().__init__()
        widths, patch = config.widths, config.patch
        layers: list[nn.Module] = [Conv(len(config.levels), widths[-1], 3, *key, "values")]
        for number in reversed(range(len(widths))):
            layers += [Block(widths[number], *key, number, block) for block in range(config.blocks)]
            if number:
                layers += [Conv(widths[number], 4 * widths[number - 1], 1, *key, number, "up"), nn.PixelShuffle(2)]
        layers += [nn.SiLU(), Conv(widths[0], 3 * patch * patch, 3, *key, "patches"), nn.PixelShuffle(patch)]
        self.layers = nn.Sequential(*layers)

    def forward(self, vectors_BLhw: Tensor) -> Tensor:
        return self.layers(vectors_BLhw)


class ImageTokenizer(nn.Module):
    """The autoencoder. `seed` alone decides its first weights."""

    def __init__(self, config: ImageTokenizerConfig, seed: int = 0):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, seed, "encoder")
        self.quantise = FSQ(config.levels)
        self.decoder = Decoder(config, seed, "decoder")

    @property
    def reach(self) -> int:
        """Codes to each side that a decoded px depends on at the most."""
        cells = 1.0  # the first convolution
        for halvings in range(len(self.config.widths)):
            cells += self.config.blocks * Block.reach / 2**halvings
        return math.ceil(cells + 1 / 2**halvings)  # the last convolution, on the finest grid

    def forward(self, image_BcHW: Tensor) -> Tensor:
        """Pictures in [-1, 1] -> their reconstructions, not clamped, with a straight-through gradient."""
        return self.decoder(self.quantise(self.encoder(image_BcHW)))

    def encode(self, image_BcHW: Tensor) -> Tensor:
        """Pictures in [-1, 1] -> codes, int64 [B, P], row by row.

        Raises ValueError if the picture's sides are not whole cells.
        """
        height, width = image_BcHW.shape[2:]
        if height % self.config.cell or width % self.config.cell:
            raise ValueError(f"a picture of {height} x {width} px is not of whole cells of {self.config.cell} px")
        return self.quantise.codes(self.encoder(image_BcHW))

    def decode(self, codes_BP: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Codes -> pictures [B, 3, H, W] in [-1, 1]. `grid`: rows and columns; a square if not given.

        Raises ValueError if the codes do not fill the grid, or are none of this tokenizer's.
        """
        return self.decoder(self.quantise.vectors(self._grid(codes_BP, grid))).clamp(-1, 1)

    def decode_windowed(self, codes_BP: Tensor, grid: tuple[int, int] | None = None, window: int = 24) -> Tensor:
        """As `decode`, `window` x `window` codes at a time: beside the picture itself, the memory is a window's.

        Each window is decoded with as much around it as its px depend on, so nothing is seen of its borders.
        """
        codes_Bhw = self._grid(codes_BP, grid)
        (b, rows, columns), cell = codes_Bhw.shape, self.config.cell
        image_BcHW = torch.empty(b, 3, rows * cell, columns * cell, device=codes_BP.device)
        for inner_h, outer_h in _windows(rows, window, self.reach):
            for inner_w, outer_w in _windows(columns, window, self.reach):
                part = self.decoder(self.quantise.vectors(codes_Bhw[:, outer_h, outer_w])).clamp(-1, 1)
                kept_h, kept_w = _px(inner_h, outer_h.start, cell), _px(inner_w, outer_w.start, cell)
                image_BcHW[:, :, _px(inner_h, 0, cell), _px(inner_w, 0, cell)] = part[:, :, kept_h, kept_w]
        return image_BcHW

    def _grid(self, codes_BP: Tensor, grid: tuple[int, int] | None) -> Tensor:
        b, p = codes_BP.shape
        rows, columns = grid or (math.isqrt(p), math.isqrt(p))
        if rows * columns != p:
            raise ValueError(f"{p} codes do not fill a grid of {rows} x {columns}")
        if p and not 0 <= int(codes_BP.min()) <= int(codes_BP.max()) < self.config.codes:
            raise ValueError(f"codes must be from 0 to {self.config.codes - 1}")
        return codes_BP.reshape(b, rows, columns)


def _windows(cells: int, window: int, reach: int) -> Iterator[tuple[slice, slice]]:
    """Windows that make up [0, cells), each alone and with `reach` cells around it."""
    for start in range(0, cells, window):
        stop = min(start + window, cells)
        yield slice(start, stop), slice(max(start - reach, 0), min(stop + reach, cells))


def _px(cells: slice, origin: int, cell: int) -> slice:
    return slice((cells.start - origin) * cell, (cells.stop - origin) * cell)
