"""Shift equivariance as a test: measure it, judge it, and draw the inputs with hypothesis.

:func:`equivariance_error` measures, :func:`assert_shift_equivariant` judges; both take any callable. The
strategies below them need hypothesis (``te_quant[test]``), which is imported when the first one is made.

Shape letters: B batch, C channels, H W sides of the images, h w sides of the output, K codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from te_quant._checks import require, require_floating, require_int, require_number, require_rank
from te_quant._shift_difference import ShiftDifference, TokenShift, equivariance_error, phase_token_shift
from te_quant.shifts import Protocol, Shift

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = [
    "TOLERANCES",
    "ShiftDifference",
    "TokenShift",
    "assert_shift_equivariant",
    "codebooks",
    "equivariance_error",
    "image_sides",
    "images",
    "latents_off_boundaries",
    "phase_token_shift",
    "shifts",
]

TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 5e-2,
    torch.bfloat16: 2e-1,
}
"""Largest difference over largest value that passes for rounding, for each dtype.

Kernels sum in another order at another place. An encoder of forty layers, circular and so exact on paper, shows
13 epsilons in float64, 9 in float32 and 2 in the half precisions. These are 25 to 50 epsilons in half precision,
800 in single, and more in double, where even that stands nine orders below what a wrong border or a strided layer
does (0.1 and more). In bfloat16 the two are close: take float64 for a verdict."""


def assert_shift_equivariant(
    function: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    shifts: Iterable[Shift],
    stride: int = 1,
    tolerance: float | None = None,
    protocol: Protocol = "circular",
    token_shift: TokenShift | None = None,
    fill: float = -1.0,
    size: tuple[int, int] | None = None,
) -> None:
    """Fail at the first shift that the output does not follow.

    Example::

        def test_my_tokenizer_follows_whole_token_shifts():
            model = MyTokenizer().double().eval()
            photos = torch.rand(2, 3, 64, 64, dtype=torch.float64) * 2 - 1
            assert_shift_equivariant(model.encode_to_indices, photos, shifts=[(4, 0), (-8, 12)], stride=4)

    Args:
        function: images -> feature map or indices.
        images: see :func:`equivariance_error`.
        shifts: pixel shifts (dy, dx), at least one.
        stride: s, pixels from one position of the output to the next.
        tolerance: largest ``relative_error`` of a floating output; of indices, the largest share that may differ.
            None: :data:`TOLERANCES` of the dtype of the output, and no index.
        protocol: see :func:`equivariance_error`, as ``token_shift``, ``fill`` and ``size``.
        token_shift: see there.
        fill: see there.
        size: see there.

    Shape:
        images: (B, C, H, W). function: -> (B, ..., h, w), floating point or integer.

    Raises:
        AssertionError: the output does not move with the images; says at which shift and where, by how much, and
            what to look at.
        ValueError: as :func:`equivariance_error`, or there is no shift.
    """
    amounts = list(shifts)
    require(len(amounts) > 0, "shifts", "at least one", "none")
    if tolerance is not None:
        require_number("tolerance", tolerance, 0)
    options: dict[str, Any] = {"protocol": protocol, "token_shift": token_shift, "fill": fill, "size": size}
    for shift in amounts:
        error = equivariance_error(function, images, shift, stride=stride, **options)
        allowed = tolerance
        if allowed is None:
            allowed = 0.0 if error.is_indices else TOLERANCES[error.dtype]
        if (error.rate if error.is_indices else error.relative_error) > allowed:
            raise AssertionError(_complaint(error, allowed, stride))


def shifts(limit: int, *, multiple_of: int = 1, identity: bool = True) -> SearchStrategy[Shift]:
    """Pixel shifts (dy, dx).

    Args:
        limit: the largest distance along either axis, pixels.
        multiple_of: all are multiples of it; the stride of a model, or 1.
        identity: whether (0, 0) is among them.
    """
    require_int("multiple_of", multiple_of, 1)
    require_int("limit", limit, 0 if identity else multiple_of)
    st = _hypothesis()
    most = limit // multiple_of
    part = st.integers(-most, most).map(lambda n: n * multiple_of)
    pairs: SearchStrategy[Shift] = st.tuples(part, part)
    return pairs if identity else pairs.filter(any)


def image_sides(divisor: int, *, smallest: int = 1, largest: int = 64) -> SearchStrategy[tuple[int, int]]:
    """(H, W), multiples of a divisor, not square in general.

    Args:
        divisor: of both sides.
        smallest: least side, pixels.
        largest: greatest side, pixels; at least one multiple must lie between.
    """
    require_int("divisor", divisor, 1)
    require_int("smallest", smallest, 1)
    low = -(-smallest // divisor)
    require_int("largest", largest, low * divisor)
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
    """White noise in [-1, 1], which holds all frequencies alike, so that aliasing cannot hide.

    Args:
        sides: (H, W), or a strategy for it such as :func:`image_sides`.
        channels: C.
        batch: B.
        dtype: floating.

    Shape:
        (B, C, H, W). Hypothesis draws a seed; the pixels themselves do not shrink.
    """
    require_int("channels", channels, 1)
    require_int("batch", batch, 1)
    st = _hypothesis()
    sizes = st.just(sides) if isinstance(sides, tuple) else sides

    def build(size: tuple[int, int], seed: int) -> Tensor:
        noise = torch.rand(batch, channels, *size, generator=_generator(seed), dtype=torch.float64)
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
    """Codebooks whose codes keep a distance from one another, by construction.

    Args:
        num_codes: least and greatest K.
        code_dim: least and greatest C.
        separation: no two codes are closer; the unit of the latents.
        dtype: floating.

    Shape:
        (K, C).
    """
    for name, (low, high) in (("num_codes", num_codes), ("code_dim", code_dim)):
        require_int(f"{name}[0]", low, 1)
        require_int(f"{name}[1]", high, low)
    require_number("separation", separation, 0)
    st = _hypothesis()

    def build(k: int, c: int, seed: int) -> Tensor:
        generator = _generator(seed)
        axes = min(c, 8)
        side = 1
        while side**axes < 2 * k:
            side += 1
        chosen = torch.randperm(side**axes, generator=generator)[:k]
        lattice = torch.stack([chosen // side**axis % side for axis in range(axes)], 1) - (side - 1) / 2
        codes = torch.rand(k, c, generator=generator, dtype=torch.float64) - 0.5
        # Lattice points 2.5 apart, moved by half a unit at most: 1.5 remain, the rest is room for rounding.
        codes[:, :axes] += 2.5 * lattice
        return (codes * separation).to(dtype)

    sizes = (st.integers(*num_codes), st.integers(*code_dim))
    drawn: SearchStrategy[Tensor] = st.builds(build, *sizes, _seeds())
    return drawn


def latents_off_boundaries(
    codebook: Tensor, *, margin: float, grid: tuple[int, int] = (4, 4), batch: int = 1
) -> SearchStrategy[tuple[Tensor, Tensor]]:
    """Latents that no disturbance smaller than ``margin`` moves to another code, with their indices.

    The margin of z with the nearest code c is its distance from the nearest boundary of the cell of c,
    r = min_{j≠c} (‖z - e_j‖² - ‖z - e_c‖²) / (2‖e_j - e_c‖). It is r_0 = min_{j≠c} ‖e_j - e_c‖ / 2 at z = e_c and
    falls by at most ‖z - e_c‖; so z is drawn closer to e_c than r_0 - margin, less what rounding to the dtype of
    the codebook can take.

    Args:
        codebook: codes to choose from; those with a neighbour closer than twice the margin are never chosen.
        margin: least r, >= 0, the unit of the latents.
        grid: (h, w).
        batch: B.

    Shape:
        codebook: (K, C). Draws a pair: latents (B, C, h, w) in the dtype of the codebook, indices (B, h, w) int64.

    Raises:
        ValueError: no code is that far from all others.
    """
    require_rank("codebook", codebook, (2,), "(K, C)")
    require_floating("codebook", codebook)
    require_number("margin", margin, 0)
    require_int("batch", batch, 1)
    codes = codebook.detach().double().cpu()
    distances = torch.cdist(codes, codes, compute_mode="donot_use_mm_for_euclid_dist")
    distances.fill_diagonal_(torch.inf)
    # A lone code has no boundary: anything near it will do.
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
        chosen = eligible[torch.randint(len(eligible), shape, generator=generator)]
        direction = torch.randn(*shape, codes.shape[1], generator=generator, dtype=torch.float64)
        direction = direction / direction.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        length = budget[chosen] * torch.rand(shape, generator=generator, dtype=torch.float64)
        latents = codes[chosen] + direction * length.unsqueeze(-1)
        return latents.movedim(-1, 1).contiguous().to(codebook.dtype), chosen

    drawn: SearchStrategy[tuple[Tensor, Tensor]] = st.builds(build, _seeds())
    return drawn


def _complaint(error: ShiftDifference, allowed: float, stride: int) -> str:
    expected, actual = error.expected, error.actual
    if error.is_indices:
        size = f"{error.differing} of {error.compared} indices differ ({allowed:.3g} of them may)"
        values = f"first at {error.position}: expected {int(expected)}, got {int(actual)}"
    else:
        size = f"relative error {error.relative_error:.3g} (tolerance {allowed:.3g} for {error.dtype})"
        values = f"largest at {error.position}: expected {expected:.6g}, got {actual:.6g}"
    if any(part % stride for part in error.shift):
        look = "the shift is no multiple of the stride, so at the downsampling layers"
    # Nearer to all of it than to the share that an error without any place would have there.
    elif error.near_border > (1 + error.border_area) / 2:
        look = f"{error.near_border:.0%} of the error lies beside the border, so at the padding"
    else:
        look = "the error lies all over the map, so at the stride, normalisation, attention and absolute positions"
    where = "position (image, ..., row, column) of the output for unshifted images"
    return (
        f"not equivariant at shift {error.shift}: {size}; {values} ({where}). Where to look: {look}. "
        "te_quant.equivariance.audit names the module."
    )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _seeds() -> SearchStrategy[int]:
    seeds: SearchStrategy[int] = _hypothesis().integers(0, 2**63 - 1)
    return seeds


def _hypothesis() -> Any:
    try:
        from hypothesis import strategies
    except ImportError as error:
        raise ImportError(
            "The strategies of te_quant.testing need hypothesis: pip install te_quant[test]."
        ) from error
    return strategies
