"""The numerical floor: how often a tokenizer agrees with itself about the same images.

Another batch size or dtype sums in another order, and near-ties between two codes then fall the other way. No
agreement under shifts means more than this one.

Shape letters: B batch, C channels, H W pixels, h w token grid, K codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from te_quant._checks import require, require_floating, require_int, require_rank, require_type
from te_quant._measuring.bootstrap import Resamples
from te_quant._measuring.calls import call_unchanged
from te_quant.equivariance.metrics.agreement import Agreement, checked_tokens, require_repeatable, tokens_of
from te_quant.equivariance.metrics.pair_tally import PairTally

__all__ = ["DEFAULT_VARIANTS", "Variant", "check_variants", "numerical_floor", "variant_tokens"]

Variant = Callable[[Tensor], Tensor] | int
DEFAULT_VARIANTS: Mapping[str, Variant] = {"batch of one": 1}


@torch.no_grad()
def numerical_floor(
    tokenize: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    num_codes: int,
    variants: Mapping[str, Variant] | None = None,
    batch_size: int = 64,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Agreement]:
    """Measure how often the same images get the same indices when only the arithmetic differs.

    Example:
        >>> def tokenize(images):
        ...     return (images[:, 0, ::4, ::4] > 0).long()
        >>> images = torch.linspace(-1, 1, 512).view(2, 1, 16, 16)
        >>> half = {"bfloat16": lambda x: tokenize(x.bfloat16())}
        >>> floor = numerical_floor(tokenize, images, num_codes=2, variants=half)
        >>> floor["bfloat16"].differing, floor["bfloat16"].tokens
        (0, 32)

    Args:
        tokenize: images -> indices; set your model to evaluation mode first.
        images: as the tokenizer sees them, in any range.
        num_codes: number of codes, K.
        variants: what to compare with ``tokenize``, by name: another callable, or a batch size below
            ``batch_size``, at which ``tokenize`` is called again. None: ``{"batch of one": 1}``, or nothing for a
            ``batch_size`` of 1.
        batch_size: images per call. The first batch is tokenized once more, to refuse randomness.
        resamples: how often the images are resampled for the intervals; 0 for none.
        seed: of the resampling.

    Shape:
        images: (B, C, H, W). tokenize and callables in ``variants``: (N, C, H, W) -> (N, h, w) integer.

    Returns:
        One agreement per variant; ``differing`` counts the indices that changed.

    Raises:
        ValueError: no image, an impossible size, a variant that is no smaller than ``batch_size``, a callable that
            returns other shapes or indices, or a tokenizer that returns other indices for the same images.
        TypeError: a variant is neither a callable nor an int, or returns no integer tensor.
    """
    require_rank("images", images, (4,), "(B, C, H, W)")
    require_floating("images", images)
    require(images.shape[0] > 0, "images", "at least one", f"shape {tuple(images.shape)}")
    num_codes = require_int("num_codes", num_codes, 1)
    batch_size = require_int("batch_size", batch_size, 1)
    drawn = Resamples(len(images), resamples, seed)
    checked = check_variants(variants, batch_size)
    tallies = {name: PairTally(num_codes) for name in checked}
    for number, batch in enumerate(torch.split(images, batch_size)):
        first = call_unchanged("tokenize", tokenize, batch)
        require_rank("tokenize(images)", first, (3,), "(N, h, w)")
        grid = (first.shape[1], first.shape[2])
        indices = checked_tokens(first, batch, grid=grid, num_codes=num_codes, label="tokenize(images)")
        if number == 0:
            require_repeatable("tokenize", tokenize, batch, indices)
        for name, tally in tallies.items():
            other = variant_tokens(name, checked[name], tokenize, batch, grid=grid, num_codes=num_codes)
            tally.add(indices, other)
            tally.close()
    return {name: tally.agreement(drawn) for name, tally in tallies.items()}


def check_variants(variants: Mapping[str, Variant] | None, batch_size: int) -> Mapping[str, Variant]:
    """Refuse variants that are neither callables nor smaller batches; None gives the default that is smaller."""
    if variants is None:
        return {} if batch_size == 1 else DEFAULT_VARIANTS
    require_type("variants", variants, Mapping, "a mapping from names to callables or batch sizes")
    for name, variant in variants.items():
        if not callable(variant):
            label = f"variants[{name!r}]"
            size = require_int(label, variant, 1)
            cure = f"{size}; pass a smaller number, or a larger batch_size"
            require(size < batch_size, label, f"below batch_size={batch_size}", cure)
    return dict(variants)


def variant_tokens(
    name: str,
    variant: Variant,
    tokenize: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    grid: tuple[int, int],
    num_codes: int,
) -> Tensor:
    """Tokenize one batch the other way.

    Shape:
        images: (B, C, H, W). Returns (B, h, w) int64 on the device of ``images``.
    """
    other, size = (tokenize, variant) if isinstance(variant, int) else (variant, len(images))
    parts = [
        tokens_of(other, part, grid=grid, num_codes=num_codes, name=f"variants[{name!r}]")
        for part in torch.split(images, size)
    ]
    return torch.cat(parts)
