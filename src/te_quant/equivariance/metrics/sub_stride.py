"""Agreement after shifts smaller than one token: the aliasing that whole-token shifts cannot show.

Shape letters: B batch, h w token grid, s stride, K codes.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from te_quant._checks import require, require_choice, require_integer_tensor, require_mask, require_rank
from te_quant.shifts import PROTOCOLS, Protocol, roll

__all__ = ["best_token_shift", "sub_stride_pairs", "sub_stride_region"]

_CANDIDATES = tuple(product((0, 1), (0, 1)))


def sub_stride_region(grid: tuple[int, int], protocol: Protocol) -> tuple[slice, slice]:
    """Say which tokens of the shifted image are compared.

    Without wrapping, the first row and column have no partner under a token shift of one. They are left
    out for all four candidates, so that the best candidate is chosen over one set of positions.
    """
    require_choice("protocol", protocol, PROTOCOLS)
    first = 0 if protocol == "circular" else 1
    return slice(first, grid[0]), slice(first, grid[1])


def best_token_shift(
    reference: Tensor, shifted: Tensor, *, protocol: Protocol, mask: Tensor | None = None
) -> Tensor:
    """Move the reference tokens, image by image, by that k in {0, 1}² which agrees best.

    Args:
        reference: i(x).
        shifted: i(T_t x), t in {0..s-1}².
        protocol: says which tokens count.
        mask: True at tokens of the shifted image that count; None counts all.

    Shape:
        reference, shifted, mask: (B, h, w). Returns (B, h, w): R_k i(x) with one k per image; the first in
        the order (0,0), (0,1), (1,0), (1,1) where several agree equally.

    Example:
        >>> tokens = torch.arange(9).view(1, 3, 3)
        >>> best_token_shift(tokens, tokens.roll(1, -1), protocol="circular").tolist()
        [[[2, 0, 1], [5, 3, 4], [8, 6, 7]]]

    Note:
        Two candidates per axis are enough for a tokenizer that chooses its sampling phase o in {0..s-1} by itself
        (adaptive polyphase): its law is k = (t + o - o')/s, and t + o - o' lies strictly between -s and 2s.

        The maximum over four candidates lifts the rate, and κ, of unrelated tokens slightly above chance.

    Raises:
        ValueError: shapes differ, or the protocol is unknown.
        TypeError: the tokens are not integer, or the mask is not bool.
    """
    require_rank("reference", reference, (3,), "(B, h, w)")
    require_integer_tensor("reference", reference)
    require_integer_tensor("shifted", shifted)
    require(
        shifted.shape == reference.shape,
        "shifted",
        f"of shape {tuple(reference.shape)}",
        tuple(shifted.shape),
    )
    rows, columns = sub_stride_region((reference.shape[1], reference.shape[2]), protocol)
    if mask is not None:
        require_mask("mask", mask, reference.shape, reference.device, "reference")
    moved = torch.stack([roll(reference, k) for k in _CANDIDATES])
    equal = moved == shifted
    if mask is not None:
        equal = equal & mask
    scores = equal[:, :, rows, columns].sum(dim=(-2, -1))
    best = scores.argmax(dim=0)
    return moved[best, torch.arange(len(best), device=best.device)]


def sub_stride_pairs(
    reference: Tensor,
    shifted: Tensor,
    *,
    protocol: Protocol,
    mask: Tensor | None = None,
    search: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pair the tokens of R_k i(x) and i(T_t x) at the best k of each image.

    Args:
        reference: i(x), or with ``search=False`` tokens that were brought to the shifted position already.
        shifted: i(T_t x).
        protocol: says which tokens count.
        mask: True at tokens of the shifted image that count; None counts all.
        search: look for the best k; False compares in place (the Fourier form).

    Shape:
        reference, shifted, mask: (B, h, w). Returns the two and the mask, each cut to the tokens that count.
    """
    if search:
        reference = best_token_shift(reference, shifted, protocol=protocol, mask=mask)
    rows, columns = sub_stride_region((reference.shape[1], reference.shape[2]), protocol)
    inner = None if mask is None else mask[:, rows, columns]
    return reference[:, rows, columns], shifted[:, rows, columns], inner
