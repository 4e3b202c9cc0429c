"""What a layer, and a whole encoder, promises about shifted images, in a form that a test can check.

A layer states two attributes: its ``reach`` (:class:`Reach`) and the shifts that it is ``exact_for``
(a :data:`Group`). :meth:`Statement.then` puts the statements of successive layers together, and the statement
of all the layers of an encoder is its :class:`EquivarianceContract`.

Shape letters: B batch, L downsamplings, H W pixels, s stride, k window side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from te_quant._checks import require_axis, require_integer_tensor, require_rank
from te_quant.shifts import Shift

__all__ = [
    "GROUPS",
    "UNKNOWN",
    "Encoding",
    "EquivarianceContract",
    "Group",
    "Reach",
    "Statement",
    "sliding_window",
]

Group: TypeAlias = Literal["integer", "stride", "interior", "none"]
"""A set of shifts, from the strongest promise to none at all; :class:`EquivarianceContract` defines each."""
GROUPS: tuple[Group, ...] = get_args(Group)


class Reach(NamedTuple):
    """How far a layer looks: the side of the square that one output pixel reads, and where the next one lies.

    Attributes:
        size: k, side of that square in pixels of the layer's own input; it contains the pixel that the output
            pixel stands for. None if every input pixel can change every output pixel.
        stride: s, input pixels from one output pixel to the next; 1/s for a layer that enlarges s times.

    Example:
        >>> Reach(3, stride=2)  # a 3x3 convolution with stride 2
        Reach(size=3, stride=2)
        >>> Reach(None)  # a normalization over the whole image
        Reach(size=None, stride=1)
    """

    size: int | None
    stride: int | Fraction = 1


class Statement(NamedTuple):
    """What a layer, or several in a row, states about itself.

    Attributes:
        reach: how far it looks.
        exact_for: the circular shifts that its output follows, in the words of :class:`EquivarianceContract`.
        adaptive: whether the layer samples at a phase that depends on the image. Its forward then returns the
            phase next to the pixels, or takes it if the layer enlarges.

    Example:
        >>> convolution = sliding_window(3, before=1, after=1, circular=True)
        >>> pooling = sliding_window(2, stride=2)
        >>> convolution.then(pooling)
        Statement(reach=Reach(size=4, stride=2), exact_for='stride', adaptive=False)
        >>> zero_padded = sliding_window(3, before=1, after=1)
        >>> zero_padded.then(pooling).exact_for
        'interior'
    """

    reach: Reach
    exact_for: Group
    adaptive: bool = False

    def then(self, following: Statement) -> Statement:
        """Return the statement of this layer with ``following`` behind it.

        Source: the usual recursion for receptive fields; a window of k pixels adds (k - 1) times the stride
            before it.
        """
        (size, stride), (wider, step) = self.reach, following.reach
        total = None if size is None or wider is None else size + math.ceil((wider - 1) * stride)
        group = self._weaker(following)
        # Pixels that were dropped do not come back on a larger grid: the product of the strides would promise
        # more shifts than the smaller grid can follow.
        if min(stride, step) < 1 < max(stride, step):
            group = "none"
        return Statement(Reach(total, _whole(stride * step)), group, self.adaptive or following.adaptive)

    def beside(self, other: Statement) -> Statement:
        """Return the statement of this layer with the output of ``other``, for the same input, added."""
        (size, stride), (wider, step) = self.reach, other.reach
        # Both windows contain the same pixel, on different sides of which they may lie.
        total = None if size is None or wider is None else size + wider - 1
        group = self._weaker(other) if stride == step else "none"
        return Statement(Reach(total, stride), group, self.adaptive or other.adaptive)

    def _weaker(self, other: Statement) -> Group:
        groups = {self.exact_for, other.exact_for}
        if "none" in groups:
            return "none"
        if "interior" in groups:
            # What enters at a border changes the pixels near it, and with them all that sees the whole image.
            return "interior" if self._is_local and other._is_local else "none"
        return "integer" if self._follows_integers and other._follows_integers else "stride"

    @property
    def _is_local(self) -> bool:
        # A phase is chosen by the content of the whole image, however small the window that it moves.
        return self.reach.size is not None and not self.adaptive

    @property
    def _follows_integers(self) -> bool:
        return self.exact_for == "integer" or self.reach.stride <= 1


UNKNOWN = Statement(Reach(None), "none")
"""The statement of a layer that states nothing."""


def sliding_window(
    size: int, *, stride: int = 1, before: int = 0, after: int = 0, circular: bool = False
) -> Statement:
    """Return the statement of a layer that applies one function to every window of its padded input.

    The output follows circular shifts over the whole grid if the windows close around the image: H/s of them,
    and none that meets padding other than the opposite side. Otherwise only the windows inside follow.

    Args:
        size: k, side of the window in pixels, dilation included.
        stride: s, pixels from one window to the next.
        before: pixels added on the left and at the top.
        after: pixels added on the right and at the bottom.
        circular: whether those pixels come from the opposite side.

    Example:
        >>> sliding_window(2, stride=2).exact_for  # the cells meet no border
        'stride'
        >>> sliding_window(3, stride=2, before=1, after=1).exact_for  # padded with zeros
        'interior'
    """
    closes = size - stride <= before + after < size
    if closes and (circular or before + after == 0):
        return Statement(Reach(size, stride), "integer" if stride == 1 else "stride")
    # With wider margins output pixel u would not read input pixel s·u, and positions would lose their meaning.
    return Statement(Reach(size, stride), "interior" if before < size else "none")


def _whole(stride: int | Fraction) -> int | Fraction:
    return int(stride) if stride == int(stride) else stride


class Encoding(NamedTuple):
    """Latents, and the pixel in its cell of s x s at which each image was sampled.

    Attributes:
        latents: (B, C, h, w).
        phases: (B, L, 2) int64 in {0, 1}: the phase of the rows and of the columns that each downsampling chose,
            finest first; zeros for layers that do not choose.

    Example:
        >>> phases = torch.tensor([[[1, 0], [0, 1]]])  # two downsamplings
        >>> Encoding(torch.zeros(1, 8, 4, 4), phases).offsets
        tensor([[1, 2]])
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
    """The shifts of the image that the tokens follow, whatever the image shows.

    Tokens i(x), circular shifts T_t by t pixels and R_k by k tokens, offsets o of x and o' of T_t x
    (:attr:`Encoding.offsets`; zero where no phase is chosen). All of it up to rounding: a token flips where two
    codes are equally near. The groups:

    - ``integer``: ``i(T_t x) = R_{(t + o - o')/s} i(x)`` for every integer t, and the quotient is whole. (Images
      that repeat themselves, such as a constant one, have several right phases; there the quotient may not be
      whole, and any of the neighbouring shifts is right.)
    - ``stride``: ``i(T_{s·k} x) = R_k i(x)`` for every integer k.
    - ``interior``: a token is one function of the pixels in its receptive field, wherever that lies in the image.
      So ``i(x')(u + k) = i(x)(u)`` where x' shows at v + s·k what x shows at v, for all tokens u such that u and
      u + k, in pixels s·u, keep a distance of ``receptive_field`` to every side. With ``replicate`` or
      ``reflect`` padding more holds for content on constant ground: as long as it keeps that distance before
      and after, *all* tokens move. Under ``zeros`` a ring of tokens at the border does not.
    - ``none``: nothing is promised. Either a layer states nothing about itself, or layers that read the whole
      image (GroupNorm, attention, a phase chosen by content) meet padding other than the opposite side, so that
      every token feels the border and what enters there.

    Attributes:
        stride: s, pixels from one token to the next.
        group: one of the four above.
        receptive_field: side in pixels of the square whose values reach one latent; None if every pixel can reach
            every latent (GroupNorm, attention, ideal filters), or if a layer does not state its reach. A phase
            selects which square; that does not count.
        divisor: the sides of an image must be divisible by it; other images are refused.

    Example:
        >>> contract = EquivarianceContract(stride=4, group="stride", receptive_field=77, divisor=4)
        >>> contract.holds_for((4, -8)), contract.holds_for((1, 0))
        (True, False)
    """

    stride: int
    group: Group
    receptive_field: int | None
    divisor: int

    def holds_for(self, shift: Shift) -> bool:
        """Return whether circular shifts of any image by (dy, dx) pixels are promised, over the whole grid."""
        multiple = shift[0] % self.stride == 0 and shift[1] % self.stride == 0
        return self.group == "integer" or (self.group == "stride" and multiple)

    def token_shifts(self, shift: Shift, reference: Encoding, shifted: Encoding) -> Tensor:
        """Return (t + o - o')/s: by how many tokens each image moved, rounded down.

        Args:
            shift: t = (dy, dx) in pixels.
            reference: the encoding of x.
            shifted: the encoding of T_t x.

        Shape:
            result: (B, 2) int64.
        """
        amount = torch.tensor(shift, device=reference.phases.device)
        return (amount + reference.offsets - shifted.offsets).div(self.stride, rounding_mode="floor")
