"""How good pictures are: PSNR and SSIM against an original, KID between two sets of pictures.

Sizes: N pictures (M of the other set), C channels, H and W pixels, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian window, in pixels
K1, K2 = 0.01, 0.03
KERNEL_DEGREE = 3


def psnr(images_NCHW: Tensor, originals_NCHW: Tensor) -> Tensor:
    """float32 [N] peak signal-to-noise ratio in dB of images in 0..1; infinite where they are equal.

    Raises ValueError if the shapes differ or a value is outside of 0..1.
    """
    _check(images_NCHW, originals_NCHW)
    error_N = (images_NCHW.float() - originals_NCHW.float()).square().mean((1, 2, 3))
    return -10 * error_N.log10()


def ssim(images_NCHW: Tensor, originals_NCHW: Tensor) -> Tensor:
    """float32 [N] structural similarity of images in 0..1 (Wang et al. 2004, equation 13), mean over channels.

    Windows lie inside the picture. Raises ValueError as `psnr`, and for a side under 11 pixels.
    """
    _check(images_NCHW, originals_NCHW)
    if min(images_NCHW.shape[2:]) < WINDOW:
        raise ValueError(f"images of {tuple(images_NCHW.shape[2:])} pixels, SSIM needs {WINDOW} a side")
    # In float64: variances are differences of nearly equal numbers.
    x, y = images_NCHW.double(), originals_NCHW.double()
    mean_x, mean_y = _blur(x), _blur(y)
    variances = _blur(x * x) - mean_x**2 + _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = K1**2, K2**2
    map_NCHW = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1) * (2 * covariance + c2) / (variances + c2)
    return map_NCHW.mean((1, 2, 3)).float()


def kid(features_ND: Tensor, others_MD: Tensor) -> float:
    """Kernel distance of two sets of features: unbiased MMD^2 with (x.y / D + 1)^3 (Binkowski et al. 2018).

    0 on average for two samples of one distribution, so it may be negative. Raises ValueError for fewer than two
    pictures in a set.
    """
    if min(len(features_ND), len(others_MD)) < 2:
        raise ValueError(f"sets of {len(features_ND)} and {len(others_MD)} pictures, KID needs two in each")
    x, y = features_ND.double(), others_MD.double()
    return (_mean_off_diagonal(_kernel(x, x)) + _mean_off_diagonal(_kernel(y, y)) - 2 * _kernel(x, y).mean()).item()


def _check(images: Tensor, originals: Tensor) -> None:
    if images.shape != originals.shape or images.dim() != 4:
        raise ValueError(f"images {tuple(images.shape)} and originals {tuple(originals.shape)}, wanted the same NCHW")
    if any(not (each.amin() >= 0 and each.amax() <= 1) for each in (images, originals)):
        raise ValueError("image values outside of 0..1")


def _blur(x_NCHW: Tensor) -> Tensor:
    """Gaussian means of all windows that lie inside, [N, C, H - 10, W - 10]."""
    place = torch.arange(WINDOW, dtype=x_NCHW.dtype, device=x_NCHW.device) - WINDOW // 2
    gauss = torch.exp(-(place**2) / (2 * SIGMA**2))
    gauss = gauss / gauss.sum()
    planes = x_NCHW.flatten(0, 1)[:, None]
    blurred = F.conv2d(F.conv2d(planes, gauss.view(1, 1, -1, 1)), gauss.view(1, 1, 1, -1))
    return blurred.view(*x_NCHW.shape[:2], *blurred.shape[2:])


def _kernel(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    return (x_ND @ y_MD.T / x_ND.shape[1] + 1) ** KERNEL_DEGREE


def _mean_off_diagonal(kernel_NN: Tensor) -> Tensor:
    n = len(kernel_NN)
    return (kernel_NN.sum() - kernel_NN.diagonal().sum()) / (n * (n - 1))
