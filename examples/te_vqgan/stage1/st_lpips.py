"""ST-LPIPS: a perceptual distance whose weights come with a package, so nothing else is downloaded.

The package itself is never imported, since it needs torchvision: only its file of weights is read.

Shape letters: B images, C channels, H W pixels, h w positions of a feature map.
"""

from __future__ import annotations

import importlib.metadata
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.te_vqgan.runs.checks import require
from te_quant.filters import binomial_kernel

__all__ = ["STLPIPS", "load_st_lpips"]

_PACKAGE = "stlpips-pytorch"
_VERSION = "0.0.2"
_FILE = "alex_shift_tolerant.pth"
_INSTALL = f"pip install {_PACKAGE}=={_VERSION}"
# Each convolution by its name in the file, with its padding, and whether max pooling and blur come before it.
_LAYERS = (
    ("slice1.0", 2, False),
    ("slice2.5", 2, True),
    ("slice3.9", 1, True),
    ("slice4.11", 1, False),
    ("slice5.13", 1, False),
)
_HEADS = len(_LAYERS)
# Images in [-1, 1] minus the first, divided by the second, have mean 0 and deviation 1 over ImageNet.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_TINY = 1e-10
# Smaller ones leave nothing to reflect before the third layer.
_MIN_SIDE = 21


class STLPIPS(nn.Module):
    """The distance of two images in the features of a shift-tolerant AlexNet, with learnt weights.

    Each feature vector is scaled to unit length; squared differences are weighted by channel, averaged over
    positions and summed over five layers. The result is 0 for equal images and mostly below 1.

    Args:
        tensors: the weights, by their names in the package's file. Their shapes give the widths of the layers.

    Shape:
        first, second: (B, 3, H, W) in [-1, 1], sides of at least 21 pixels. result: (B,).

    Raises:
        ValueError: a weight is missing; the images have another shape.

    Source: Ghildyal and Liu 2022, arXiv:2207.13686, its AlexNet: LPIPS (Zhang et al. 2018, arXiv:1801.03924) with
        stride 1 in the first convolution and blur, over reflected borders, wherever there was a stride.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        names = [f"net.{name}.{part}" for name, _, _ in _LAYERS for part in ("weight", "bias")]
        names += [_head(number) for number in range(_HEADS)]
        missing = [name for name in names if name not in tensors]
        require(not missing, "weights", f"those of {_PACKAGE} {_VERSION}", f"none called {', '.join(missing)}")
        self.convolutions = nn.ParameterList(tensors[f"net.{name}.weight"] for name, _, _ in _LAYERS)
        self.biases = nn.ParameterList(tensors[f"net.{name}.bias"] for name, _, _ in _LAYERS)
        self.heads = nn.ParameterList(tensors[_head(number)].flatten() for number in range(_HEADS))
        self.register_buffer("shift", torch.tensor(_SHIFT).reshape(3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).reshape(3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the distance of each pair."""
        for name, images in (("first", first), ("second", second)):
            shape = tuple(images.shape)
            good = images.ndim == 4 and shape[1] == 3 and min(shape[2:]) >= _MIN_SIDE
            require(good, name, f"(B, 3, H, W) with sides of at least {_MIN_SIDE} pixels", shape)
        require(first.shape == second.shape, "second", f"as first, {tuple(first.shape)}", tuple(second.shape))
        total = first.new_zeros(len(first))
        for one, two, head in zip(self._features(first), self._features(second), self.heads, strict=True):
            difference = (_unit(one) - _unit(two)).square()
            total = total + (difference * head[:, None, None]).sum(dim=1).mean(dim=(1, 2))
        return total

    def _features(self, images: Tensor) -> list[Tensor]:
        """Return the rectified features of each layer, (B, C, h, w)."""
        hidden = (images - self.shift) / self.scale
        found: list[Tensor] = []
        for (_, padding, pooled), weight, bias in zip(_LAYERS, self.convolutions, self.biases, strict=True):
            if pooled:
                hidden = _blurred(F.max_pool2d(hidden, 3, stride=1))
            hidden = F.conv2d(hidden, weight, bias, padding=padding)
            if not found:
                # The first layer has no pooling and is blurred before it is rectified.
                hidden = _blurred(hidden)
            hidden = F.relu(hidden)
            found.append(hidden)
        return found


def load_st_lpips() -> STLPIPS:
    """Return the distance with the weights of the installed package, on the CPU.

    Raises:
        ImportError: the package is not installed.
        ValueError: its file of weights is damaged or another version's.
    """
    path = _weights()
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} must hold the weights of {_PACKAGE} {_VERSION}, got {error}.") from error
    return STLPIPS(tensors)


def _weights() -> Path:
    """Find the file among those that the package installed, without importing it."""
    try:
        files = importlib.metadata.files(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            f"--perceptual st-lpips needs the weights in {_PACKAGE}: `{_INSTALL}`, which leaves torch as it is. "
            "--perceptual none needs no package."
        ) from error
    found = [Path(str(file.locate())) for file in files if file.name == _FILE]
    there = [path for path in found if path.is_file()]
    if not there:
        raise ImportError(f"{_PACKAGE} must be version {_VERSION}, got one without {_FILE}: `{_INSTALL}`.")
    return there[0]


def _head(number: int) -> str:
    return f"lin{number}.model.1.weight"


def _blurred(hidden: Tensor) -> Tensor:
    """Blur with (1, 2, 1) / 4 along both axes, over two reflected pixels at each border, with stride 2."""
    taps = binomial_kernel(3, dtype=hidden.dtype, device=hidden.device)
    weight = torch.outer(taps, taps).expand(hidden.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(hidden, (2, 2, 2, 2), mode="reflect"), weight, stride=2, groups=hidden.shape[1])


def _unit(features: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features / (norms + _TINY)
