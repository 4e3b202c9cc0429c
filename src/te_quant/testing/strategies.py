"""Hypothesis strategies for the inputs of an equivariance property.

Only making the first strategy imports hypothesis (``te_quant[testing]``).

Shape letters: B batch, C channels, H W sides of the images, h w token grid, K codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from te_quant._checks import require, require_floating, require_int, require_number, require_rank
from te_quant.shifts import Shift

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = ["codebooks", "image_sides", "images", "latents_off_boundaries", "shifts"]

# Codes keep apart along the first of their channels.
_AXES = 8


def shifts(limit: int, *, multiple_of: int = 1, identity: bool = False) -> SearchStrategy[Shift]:
    """Draw pixel shifts (dy, dx).

    Args:
        limit: the largest distance along either axis, pixels. :func:`assert_shift_equivariant` needs one below the
            sides of the images, so that every shift moves them.
        multiple_of: all are multiples of it; the stride of a model, or 1.
        identity: whether (0, 0) is among them; it moves nothing.

    Example:
        >>> from hypothesis import given
        >>> @given(shifts(8, multiple_of=4))
        ... def test_multiples(shift):
        ...     assert all(part in (-8, -4, 0, 4, 8) for part in shift)
        >>> test_multiples()
    """
    multiple_of = require_int("multiple_of", multiple_of, 1)
    limit = require_int("limit", limit, 0 if identity else multiple_of)
    st = _hypothesis()
    most = limit // multiple_of
    part = st.integers(-most, most).map(lambda n: n * multiple_of)
    pairs: SearchStrategy[Shift] = st.tuples(part, part)
    return pairs if identity else pairs.filter(any)


def image_sides(divisor: int, *, smallest: int = 1, largest: int = 64) -> SearchStrategy[tuple[int, int]]:
    """Draw (H, W), multiples of a divisor and in general not square.

    Args:
        divisor: of both sides.
        smallest: the smallest side, pixels.
        largest: the largest side, pixels; at least one multiple must lie between.
    """
    divisor = require_int("divisor", divisor, 1)
    smallest = require_int("smallest", smallest, 1)
    low = -(-smallest // divisor)
    largest = require_int("largest", largest, low * divisor)
    st = _hypothesis()
    side = st.integers(low, largest // divisor).map(lambda n: n * divisor)
    pairs: SearchStrategy[tuple[int, int]] = st.tuples(side, side)
    return pairs


def images(
    sides: tuple[int, int] | SearchStrategy[tuple[int, int]],
    *,
    channels: int = 3,
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
) -> SearchStrategy[Tensor]:
    """Draw white noise in [-1, 1], which contains all frequencies equally, so that aliasing cannot hide.

    Args:
        sides: (H, W), or a strategy for it such as :func:`image_sides`.
        channels: number of channels, C.
        batch: number of images, B.
        dtype: floating.

    Shape:
        (B, C, H, W). Hypothesis draws a seed; the pixels themselves do not shrink.
    """
    channels = require_int("channels", channels, 1)
    batch = require_int("batch", batch, 1)
    st = _hypothesis()
    sizes = st.just(sides) if isinstance(sides, tuple) else sides

    def build(size: tuple[int, int], seed: int) -> Tensor:
        noise = torch.rand(batch, channels, *size, generator=_generator(seed), dtype=torch.float64, device="cpu")
        return (noise * 2 - 1).to(dtype)

    drawn: SearchStrategy[Tensor] = st.builds(build, sizes, _seeds())
    return drawn


def codebooks(
    *,
    num_codes: tuple[int, int] = (1, 16),
    code_dim: tuple[int, int] = (1, 8),
    separation: float = 0.5,
    dtype: torch.dtype = torch.float64,
) -> SearchStrategy[Tensor]:
    """Draw codebooks whose codes keep a distance from one another, by construction.

    Args:
        num_codes: smallest and largest K.
        code_dim: smallest and largest C.
        separation: no two codes are closer than this, in the unit of the latents.
        dtype: floating.

    Shape:
        (K, C).

    Raises:
        ValueError: an option is out of range, or so many codes of so few channels do not keep apart in ``dtype``.
        TypeError: ``num_codes`` or ``code_dim`` is no pair.
    """
    for name, pair in (("num_codes", num_codes), ("code_dim", code_dim)):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"{name} must be a pair of ints (smallest, largest), got {pair!r}.")
        low = require_int(f"{name}[0]", pair[0], 1)
        require_int(f"{name}[1]", pair[1], low)
    # Up to this many lattice points along an axis, rounding takes less than the room that they leave.
    side, axes = int(0.5 / torch.finfo(dtype).eps / 1.25), min(code_dim[0], _AXES)
    most = side**axes // 2
    few = f"at most {most} with code_dim[0]={code_dim[0]} in {dtype}"
    require(num_codes[1] <= most, "num_codes[1]", few, num_codes[1])
    separation = require_number("separation", separation, 0)
    # The farthest that a lattice point lies from the origin, moved by half a unit.
    farthest = 1.25 * (_lattice_side(num_codes[1], axes) - 1) + 0.5
    limit = torch.finfo(dtype).max / farthest
    require(separation <= limit, "separation", f"at most {limit:.3g} in {dtype}", separation)
    st = _hypothesis()

    def build(k: int, c: int, seed: int) -> Tensor:
        generator = _generator(seed)
        axes = min(c, _AXES)
        side = _lattice_side(k, axes)
        chosen = torch.randperm(side**axes, generator=generator, device="cpu")[:k]
        lattice = torch.stack([chosen // side**axis % side for axis in range(axes)], 1) - (side - 1) / 2
        codes = torch.rand(k, c, generator=generator, dtype=torch.float64, device="cpu") - 0.5
        # Lattice points 2.5 apart, moved by half a unit at most: 1.5 remain, the rest is room for rounding.
        codes[:, :axes] += 2.5 * lattice
        return (codes * separation).to(dtype)

    sizes = (st.integers(*num_codes), st.integers(*code_dim))
    drawn: SearchStrategy[Tensor] = st.builds(build, *sizes, _seeds())
    return drawn


def _lattice_side(num_codes: int, axes: int) -> int:
    """Return how many points an axis needs for a lattice with two for each code."""
    side = 1
    while side**axes < 2 * num_codes:
        side += 1
    return side


def latents_off_boundaries(
    codebook: Tensor, *, margin: float, grid: tuple[int, int] = (4, 4), batch: int = 1
) -> SearchStrategy[tuple[Tensor, Tensor]]:
    """Draw latents that no disturbance smaller than ``margin`` moves to another code, with their indices.

    The margin of z with the nearest code c is its distance from the nearest boundary of the cell of c,
    r = min_{j≠c} (‖z - e_j‖² - ‖z - e_c‖²) / (2‖e_j - e_c‖). It is r_0 = min_{j≠c} ‖e_j - e_c‖ / 2 at z = e_c and
    falls by at most ‖z - e_c‖; so z is drawn closer to e_c than r_0 - margin, less what rounding to the dtype of
    the codebook can take.

    Args:
        codebook: codes to choose from; those with a neighbour closer than twice the margin are never chosen.
        margin: the smallest r, >= 0, in the unit of the latents.
        grid: (h, w).
        batch: number of images, B.

    Shape:
        codebook: (K, C). Draws a pair: latents (B, C, h, w) in the dtype of the codebook, indices (B, h, w) int64.

    Raises:
        ValueError: no code is that far from all others.
    """
    require_rank("codebook", codebook, (2,), "(K, C)")
    require_floating("codebook", codebook)
    margin = require_number("margin", margin, 0)
    batch = require_int("batch", batch, 1)
    codes = codebook.detach().double().cpu()
    distances = torch.cdist(codes, codes, compute_mode="donot_use_mm_for_euclid_dist")
    distances.fill_diagonal_(torch.inf)
    # A single code has no boundary: anything near it will do.
    reach = distances.amin(1).div(2).nan_to_num(posinf=margin + 1.0)
    rounding = 4 * torch.finfo(codebook.dtype).eps * (codes.norm(dim=1) + reach)
    budget = reach - margin - rounding
    eligible = (budget > 0).nonzero().flatten()
    largest = float((reach - rounding).max())
    require(len(eligible) > 0, "margin", f"below {largest:.3g}, half the distance of the loneliest code", margin)
    st = _hypothesis()

    def build(seed: int) -> tuple[Tensor, Tensor]:
        generator = _generator(seed)
        shape = (batch, *grid)
        chosen = eligible[torch.randint(len(eligible), shape, generator=generator, device="cpu")]
        direction = torch.randn(*shape, codes.shape[1], generator=generator, dtype=torch.float64, device="cpu")
        direction = direction / direction.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        length = budget[chosen] * torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
        latents = codes[chosen] + direction * length.unsqueeze(-1)
        return latents.movedim(-1, 1).contiguous().to(codebook.dtype), chosen

    drawn: SearchStrategy[tuple[Tensor, Tensor]] = st.builds(build, _seeds())
    return drawn


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _seeds() -> SearchStrategy[int]:
    seeds: SearchStrategy[int] = _hypothesis().integers(0, 2**63 - 1)
    return seeds


def _hypothesis() -> Any:
    try:
        from hypothesis import strategies
    except ImportError as error:
        cure = "pip install 'te_quant[testing]'"
        raise ImportError(f"hypothesis must be installed to draw inputs: {cure}.") from error
    return strategies
