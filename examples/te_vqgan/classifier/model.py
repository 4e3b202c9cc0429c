"""The classifier that reads generated images: which digit in which colour stands in a cell.

Shape letters: B images or cells, S canvas side, c side of a cell, P places, L classes, Q colours.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.te_vqgan.classifier.settings import ClassifierSettings, check_widths
from examples.te_vqgan.data.recipes import PLACES
from examples.te_vqgan.runs.checkpoint import load_checkpoint, save_checkpoint
from examples.te_vqgan.runs.checks import require, require_int
from examples.te_vqgan.runs.files import read_json_object, write_text_atomically

__all__ = [
    "CellClassifier",
    "ClassifierOutput",
    "ClassifierSettings",
    "crop_places",
    "feature_distance",
    "load_classifier",
    "save_classifier",
    "weights_path",
]

_CONFIG, _WEIGHTS, _MODEL = "config.json", "model.safetensors", "model"
# As in the published LPIPS: added to a norm, so that features of zero stay zero.
_TINY = 1e-10


class ClassifierOutput(NamedTuple):
    """What a cell may show.

    Shape:
        digit_logits: (B, L). color_logits: (B, Q).
    """

    digit_logits: Tensor
    color_logits: Tensor


class CellClassifier(nn.Module):
    """A residual network with one head for the digit and one for its colour.

    Args:
        num_classes: L, at least 1.
        num_colors: Q, at least 1.
        widths: channels of each stage, finest first; every stage but the first halves the sides.
        blocks: residual blocks of two 3x3 convolutions a stage, at least 1.
        stem_stride: stride of the first convolution, whose kernel is 2 x stride + 1 wide. 1 suits the
            32-pixel cells for which others made the network; 2 makes everything four times as cheap.
        margin: pixels at each border of a cell that are cut off first, at least 0. 2 of a 32-pixel cell leave the
            28-pixel crop that the paper's authors classify.

    Shape:
        cells: (B, 3, c, c) in [-1, 1], ground -1. digit_logits: (B, L). color_logits: (B, Q).

    Raises:
        ValueError: an option is out of range, or the cells are not (B, 3, c, c).

    Source: He et al. 2016, arXiv:1512.03385; widths (64, 128, 256, 512) with two blocks are its ResNet-18.
        Differs: no max pooling behind the stem, since cells are small; the stem also sees each pixel's
        brightest channel; two heads.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        num_colors: int = 4,
        widths: tuple[int, ...] = (16, 32, 64),
        blocks: int = 2,
        stem_stride: int = 1,
        margin: int = 0,
    ) -> None:
        super().__init__()
        for name, value in {"num_classes": num_classes, "num_colors": num_colors, "blocks": blocks}.items():
            require_int(name, value, 1)
        require_int("stem_stride", stem_stride, 1)
        require_int("margin", margin, 0)
        check_widths(widths)
        self.config: dict[str, Any] = {
            "num_classes": num_classes,
            "num_colors": num_colors,
            "widths": tuple(widths),
            "blocks": blocks,
            "stem_stride": stem_stride,
        }
        if margin:
            self.config["margin"] = margin
        self.margin = margin
        self.stem = nn.Sequential(
            nn.Conv2d(4, widths[0], 2 * stem_stride + 1, stem_stride, stem_stride, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        )
        self.stages = nn.ModuleList()
        before = widths[0]
        for number, width in enumerate(widths):
            strides = [1 if number == 0 else 2] + [1] * (blocks - 1)
            inputs = [before] + [width] * (blocks - 1)
            self.stages.append(nn.Sequential(*(_Block(i, width, s) for i, s in zip(inputs, strides, strict=True))))
            before = width
        self.digit_head = nn.Linear(before, num_classes)
        self.color_head = nn.Linear(before, num_colors)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, cells: Tensor) -> ClassifierOutput:
        """Return the logits of digit and colour."""
        if self.margin:
            side = cells.shape[-1]
            require(side > 2 * self.margin, "cells", f"wider than {2 * self.margin} pixels", tuple(cells.shape))
            cells = cells[..., self.margin : side - self.margin, self.margin : side - self.margin]
        pooled = self.features(cells)[-1].mean(dim=(2, 3))
        return ClassifierOutput(self.digit_head(pooled), self.color_head(pooled))

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the activations after each stage, finest first.

        Shape:
            images: (B, 3, H, W) in [-1, 1], cells or whole images. result: (B, widths[i], h_i, w_i).
        """
        require(images.ndim == 4 and images.shape[1] == 3, "images", "(B, 3, H, W)", tuple(images.shape))
        # The ground becomes 0, with which the stem pads too, so it sees no border. The brightest channel is the
        # digit whatever its colour; given it, fewer steps are needed.
        light = (images + 1.0) / 2.0
        hidden = self.stem(torch.cat([light, light.amax(dim=1, keepdim=True)], dim=1))
        found = []
        for stage in self.stages:
            hidden = stage(hidden)
            found.append(hidden)
        return found


class _Block(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        # Each block starts as its shortcut (Goyal et al. 2017, arXiv:1706.02677, section 5.1).
        nn.init.zeros_(self.norm2.weight)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x), inplace=True)


def crop_places(images: Tensor, places: Sequence[int] | None = None) -> Tensor:
    """Cut the cells out of images.

    Args:
        images: quadrant images.
        places: indices into ``PLACES``, the four quadrants row by row and then the centre; all by default.

    Shape:
        images: (B, 3, S, S), S a multiple of 4. result: (B, P, 3, S/2, S/2).

    Raises:
        ValueError: another shape, no place, or one that is not there.
    """
    shape = tuple(images.shape)
    good = images.ndim == 4 and shape[1] == 3 and shape[2] == shape[3] and shape[2] % 4 == 0
    require(good, "images", "(B, 3, S, S) with S a multiple of 4", shape)
    chosen = range(len(PLACES)) if places is None else list(places)
    known = len(chosen) > 0 and all(0 <= place < len(PLACES) for place in chosen)
    require(known, "places", f"one or more indices in [0, {len(PLACES)})", list(chosen))
    c = shape[2] // 2
    corners = [(0, 0), (0, c), (c, 0), (c, c), (c // 2, c // 2)]
    cells = [images[:, :, top : top + c, left : left + c] for top, left in (corners[place] for place in chosen)]
    return torch.stack(cells, dim=1)


def feature_distance(classifier: CellClassifier, first: Tensor, second: Tensor) -> Tensor:
    """Compare images by what the classifier sees in them: 0 for equal ones, at most 2 a stage.

    At each pixel of each stage the channels are scaled to unit length; the squared differences are summed over
    channels, averaged over pixels and summed over stages.

    Args:
        classifier: in evaluation mode.
        first: images in [-1, 1].
        second: those they are compared with.

    Shape:
        first, second: (B, 3, H, W). result: (B,).

    Raises:
        ValueError: the shapes differ, or the classifier is in training mode, where images would change each
            other's features.

    Source: Zhang et al. 2018, arXiv:1801.03924, Eq. 1. Differs: this classifier's features, and every channel
        weighs the same, so the numbers are not those of LPIPS.
    """
    require(not classifier.training, "classifier", "in evaluation mode", "training mode")
    require(first.shape == second.shape, "second", f"as first, {tuple(first.shape)}", tuple(second.shape))
    total = first.new_zeros(len(first))
    for one, two in zip(classifier.features(first), classifier.features(second), strict=True):
        total = total + (_unit(one) - _unit(two)).square().sum(dim=1).mean(dim=(1, 2))
    return total


def _unit(features: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features / (norms + _TINY)


def save_classifier(classifier: CellClassifier, folder: Path) -> None:
    """Write ``model.safetensors`` and ``config.json`` into ``folder``, for :func:`load_classifier`."""
    save_checkpoint(folder / _WEIGHTS, classifier.state_dict(), {})
    write_text_atomically(folder / _CONFIG, json.dumps(classifier.config, indent=2) + "\n")


def weights_path(folder: Path) -> Path:
    """Return the file with the weights of the classifier in ``folder``, as :func:`load_classifier` takes it."""
    inner = folder / _MODEL
    return (inner if inner.is_dir() else folder) / _WEIGHTS


def load_classifier(folder: Path) -> CellClassifier:
    """Return a trained classifier on the CPU, in evaluation mode.

    Args:
        folder: what :func:`save_classifier` wrote to, or the run's folder around it.

    Raises:
        ValueError: it holds no classifier.
    """
    where = weights_path(folder).parent
    require((where / _CONFIG).exists(), "folder", "one with a trained classifier", folder)
    config = read_json_object(where / _CONFIG)
    classifier = CellClassifier(**{**config, "widths": tuple(config["widths"])})
    tensors, _ = load_checkpoint(where / _WEIGHTS)
    classifier.load_state_dict(tensors)
    return classifier.eval()
