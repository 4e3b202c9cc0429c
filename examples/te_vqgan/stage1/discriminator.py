"""The patch discriminator: judges overlapping patches of an image, not the image.

Shape letters: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from torch import Tensor, nn

from examples.te_vqgan.runs.checks import require_choice, require_int

__all__ = ["DISCRIMINATOR_NORMS", "PatchDiscriminator"]

DISCRIMINATOR_NORMS = ("group", "batch")
_INITIAL_STD = 0.02


class PatchDiscriminator(nn.Module):
    """Convolutions down to one logit a patch, high for real ones.

    Args:
        image_channels: C, at least 1.
        base_channels: width of the first layer; doubled by each of the two next. A multiple of 4.
        num_layers: how many layers halve the sides, at least 1.
        norm: ``"group"``, so that the verdict on an image depends neither on the batch nor on the number of
            processes; or ``"batch"``, with the initial weights that belong to it.

    Shape:
        images: (B, C, H, W) -> (B, 1, h, w).

    Source: Isola et al. 2017, arXiv:1611.07004, section 3.3 and, for the initial weights of ``norm="batch"``,
        section 6.2. Differs: group normalization by default.
    """

    def __init__(
        self, image_channels: int = 3, base_channels: int = 32, num_layers: int = 2, *, norm: str = "group"
    ) -> None:
        require_int("image_channels", image_channels, 1)
        require_int("base_channels", base_channels, 4)
        require_int("num_layers", num_layers, 1)
        require_choice("norm", norm, DISCRIMINATOR_NORMS)
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(image_channels, base_channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = base_channels
        for number in range(1, num_layers + 1):
            wider = base_channels * min(2**number, 8)
            stride = 2 if number < num_layers else 1
            layers += [
                nn.Conv2d(width, wider, 4, stride, 1, bias=False),
                nn.BatchNorm2d(wider) if norm == "batch" else nn.GroupNorm(4, wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))
        if norm == "batch":
            for layer in self.layers:
                if isinstance(layer, nn.Conv2d):
                    nn.init.normal_(layer.weight, 0.0, _INITIAL_STD)
                elif isinstance(layer, nn.BatchNorm2d):
                    nn.init.normal_(layer.weight, 1.0, _INITIAL_STD)

    def forward(self, images: Tensor) -> Tensor:
        """Return one logit a patch."""
        logits: Tensor = self.layers(images)
        return logits
