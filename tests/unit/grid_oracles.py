"""Slow float64 versions of the grid operations, written with loops over pixels, to compare the fast ones with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tests.helpers import numpy_generator

NUMPY_MODES = {"zeros": "constant", "replicate": "edge", "reflect": "reflect", "circular": "wrap"}


def fresh(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers, other ones at each call."""
    return torch.from_numpy(numpy_generator().standard_normal(shape)).to(dtype)


def pad(images: np.ndarray, margins: tuple[int, int, int, int], mode: str) -> np.ndarray:
    """NumPy's padding of the last two axes; margins are (left, right, top, bottom)."""
    left, right, top, bottom = margins
    return np.pad(images, ((0, 0), (0, 0), (top, bottom), (left, right)), mode=NUMPY_MODES[mode])


def blur(images: np.ndarray, taps: np.ndarray, stride: int, mode: str) -> np.ndarray:
    """Weighted sums around every stride-th pixel, in loops over the output and the taps."""
    k, (B, C, H, W) = len(taps), images.shape
    padded = pad(images, ((k - 1) // 2, k // 2, (k - 1) // 2, k // 2), mode)
    result = np.zeros((B, C, -(-H // stride), -(-W // stride)))
    for u in range(result.shape[2]):
        for v in range(result.shape[3]):
            for i in range(k):
                for j in range(k):
                    pixel = padded[:, :, u * stride + i, v * stride + j]
                    result[:, :, u, v] += taps[i] * taps[j] * pixel
    return result


def convolve(
    images: np.ndarray,
    weight: Tensor,
    bias: Tensor,
    margins: tuple[int, int, int, int],
    mode: str,
    stride: int = 1,
) -> np.ndarray:
    """A convolution, one output pixel at a time."""
    weight, bias = weight.detach().numpy(), bias.detach().numpy()
    k = weight.shape[-1]
    padded = pad(images, margins, mode)
    rows = range(0, padded.shape[2] - k + 1, stride)
    columns = range(0, padded.shape[3] - k + 1, stride)
    result = np.zeros((images.shape[0], weight.shape[0], len(rows), len(columns)))
    for u, i in enumerate(rows):
        for v, j in enumerate(columns):
            window = padded[:, None, :, i : i + k, j : j + k]
            result[:, :, u, v] = (window * weight[None]).sum((2, 3, 4)) + bias
    return result


def normalize(images: np.ndarray, groups: int, eps: float = 1e-6) -> np.ndarray:
    """GroupNorm with unit gain and no offset, group by group."""
    result = np.empty_like(images)
    size = images.shape[1] // groups
    for b in range(images.shape[0]):
        for g in range(groups):
            values = images[b, g * size : (g + 1) * size]
            spread = np.sqrt(((values - values.mean()) ** 2).mean() + eps)
            result[b, g * size : (g + 1) * size] = (values - values.mean()) / spread
    return result


def silu(values: np.ndarray) -> np.ndarray:
    """The x·sigmoid(x) of Elfwing et al. 2018."""
    return values / (1 + np.exp(-values))


def roll(images: Tensor, rows: int, columns: int) -> Tensor:
    """Circular shift down and to the right."""
    return images.roll((rows, columns), (-2, -1))
