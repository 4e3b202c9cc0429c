"""What an encoder promises about shifted images, in a form that a test can hold it to.

Shape letters: B batch, L downsamplings, H W pixels, s stride.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn

from te_quant._checks import require_axis, require_integer_tensor, require_rank
from te_quant.autoencoder.config import AutoencoderConfig
from te_quant.layers import (
    BlurPool2d,
    ChannelNorm,
    FilteredActivation,
    FourierDownsample2d,
    MaxBlurPool,
    MaxPool,
    PolynomialActivation,
    PolyphaseDownsample2d,
    SelfAttention2d,
)
from te_quant.shifts import Shift

__all__ = ["GROUPS", "Encoding", "EquivarianceContract", "Group", "encoder_contract", "receptive_field"]

Group: TypeAlias = Literal["integer", "stride", "interior", "none"]
GROUPS: tuple[Group, ...] = get_args(Group)


class Encoding(NamedTuple):
    """Latents, and where in its cell of s x s pixels each image was sampled.

    Attributes:
        latents: (B, C, h, w).
        phases: (B, L, 2) int64 in {0, 1}: the phase of the rows and of the columns that each downsampling chose,
            finest first; zeros for kinds that do not choose.
    """

    latents: Tensor
    phases: Tensor

    @property
    def offsets(self) -> Tensor:
        """(B, 2) int64, o = Σ_l 2^l·phase_l, in [0, s): latent (0, 0) sits at this row and column of pixels."""
        require_rank("phases", self.phases, (3,), "(B, L, 2)")
        require_integer_tensor("phases", self.phases)
        require_axis("phases", self.phases, 2, 2, "2")
        scales = 2 ** torch.arange(self.phases.shape[1], device=self.phases.device)
        return (self.phases * scales[:, None]).sum(1)


@dataclass(frozen=True)
class EquivarianceContract:
    """For which shifts of the image the tokens follow, whatever the image shows.

    Tokens i(x), circular shifts T_t by t pixels and R_k by k tokens, offsets o of x and o' of T_t x
    (:attr:`Encoding.offsets`; zero where no phase is chosen). All of it up to rounding: a token flips where two
    codes are equally near. The groups:

    - ``integer``: ``i(T_t x) = R_{(t + o - o')/s} i(x)`` for every integer t, and the quotient is whole. (Images
      that repeat themselves, as a constant one, have several right phases; there the quotient may not be whole,
      and any of the neighbouring shifts is right.)
    - ``stride``: ``i(T_{s·k} x) = R_k i(x)`` for every integer k.
    - ``interior``: a token is one function of the pixels in its receptive field wherever that lies in the image.
      So ``i(x')(u + k) = i(x)(u)`` where x' shows at v + s·k what x shows at v, for all tokens u such that u and
      u + k, in pixels s·u, keep a distance of ``receptive_field`` to every side. With ``replicate`` or
      ``reflect`` padding more is true of content on constant ground: as long as it keeps that distance before
      and after, *all* tokens move. Under ``zeros`` a ring of tokens at the border does not.
    - ``none``: nothing is promised. The layers read the whole image (GroupNorm, attention, a phase chosen by
      content) and pad with something other than the opposite side, so that content which enters, or a border, is
      felt by every token.

    Attributes:
        stride: s, pixels from one token to the next.
        group: see above.
        receptive_field: side in pixels of the square whose values reach one latent; None if every pixel reaches
            every latent (GroupNorm, attention, ideal filters). Which square a phase selects does not count.
        divisor: what the sides of an image must be divisible by; others are refused.
    """

    stride: int
    group: Group
    receptive_field: int | None
    divisor: int

    def holds_for(self, shift: Shift) -> bool:
        """Whether circular shifts of any image by (dy, dx) pixels are within the promise, over the whole grid."""
        multiple = shift[0] % self.stride == 0 and shift[1] % self.stride == 0
        return self.group == "integer" or (self.group == "stride" and multiple)

    def token_shifts(self, shift: Shift, reference: Encoding, shifted: Encoding) -> Tensor:
        """(t + o - o')/s: by how many tokens each image moved, rounded down.

        Args:
            shift: t = (dy, dx) in pixels.
            reference: of x.
            shifted: of T_t x.

        Shape:
            result: (B, 2) int64.
        """
        amount = torch.tensor(shift, device=reference.phases.device)
        return (amount + reference.offsets - shifted.offsets).div(self.stride, rounding_mode="floor")


def encoder_contract(config: AutoencoderConfig, encoder: nn.Module) -> EquivarianceContract:
    """The contract of ``encoder``, built from ``config``."""
    adaptive = config.downsample == "polyphase" and config.stride > 1
    local = config.norm == "channel" and not config.attention_levels and not adaptive
    group: Group = "interior" if local else "none"
    if config.encoder_padding == "circular":
        group = "integer" if adaptive or config.stride == 1 else "stride"
    return EquivarianceContract(config.stride, group, receptive_field(encoder), config.divisor)


def receptive_field(encoder: nn.Module) -> int | None:
    """Side in pixels of the square of the image that reaches one output pixel, or None for the whole image.

    Args:
        encoder: made of layers of this package and of plain convolutions, registered in the order in which they
            run; a layer beside another one (a shortcut) must not reach further.

    Raises:
        TypeError: a layer is of a type whose reach is not known.

    Source: the usual recursion; each kernel of k adds (k - 1) times the stride before it.
    """
    reach, stride = 1, 1
    for layer in encoder.modules():
        if isinstance(layer, (nn.GroupNorm, SelfAttention2d, FourierDownsample2d, *_FILTERED)):
            return None
        size, step = _kernel(layer)
        reach += (size - 1) * stride
        stride *= step
    return reach


_FILTERED = (FilteredActivation, PolynomialActivation)
_POINTWISE = (ChannelNorm, nn.LayerNorm, nn.SiLU, nn.Dropout, nn.Identity)


def _kernel(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Conv2d):
        return layer.kernel_size[0], layer.stride[0]
    if isinstance(layer, BlurPool2d):
        return layer.kernel_size, layer.stride
    if isinstance(layer, PolyphaseDownsample2d):
        return 1, layer.stride
    # The maximum of two pixels; of a MaxBlurPool the blur is a layer of its own.
    if isinstance(layer, MaxPool):
        return 2, 2
    if isinstance(layer, MaxBlurPool):
        return 2, 1
    if not isinstance(layer, _POINTWISE) and not any(layer.children()):
        raise TypeError(f"layer must be one whose reach is known, got {type(layer).__name__}.")
    return 1, 1
