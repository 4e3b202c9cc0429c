"""The nearest code by whole tiles of scores; also draws codes at a temperature.

Shape letters: N latent vectors, C code size, K codes.

A running minimum over the tiles takes a later tile only where it is strictly smaller, so ties go to the lowest
index. Accelerators search this way, and a CPU does where one tile holds all scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from te_quant._search import tiles

__all__ = ["tiled_argmin"]


def tiled_argmin(
    latents: Tensor, codebook: Tensor, temperature: float, generator: torch.Generator | None
) -> Tensor:
    """Return the index of the nearest code, or of a drawn one, for each row.

    Args:
        latents: z, before quantization.
        codebook: e.
        temperature: 0 takes the nearest code; above, code e has probability ∝ exp(-‖z - e‖² / (2 · temperature)).
        generator: of the draws; the global one if None.

    Shape:
        latents: (N, C). codebook: (K, C). Returns (N,) int64.
    """
    rows, codes = latents.shape[0], codebook.shape[0]
    center = tiles.center_of(codebook)
    centered = codebook - center
    if temperature:
        # In units of the squared latents, so nothing may be scaled.
        factors, half_norms = centered, centered.square().sum(1).mul_(0.5)
    else:
        factors, half_norms = tiles.factors_of(centered)
    tile_codes = min(codes, tiles.MAX_TILE_CODES)
    budget = tiles.CPU_TILE if latents.device.type == "cpu" else tiles.DEVICE_TILE
    tile_rows = max(1, min(rows, budget // tile_codes))
    buffer = latents.new_empty(tile_rows * tile_codes)
    indices = torch.empty(rows, dtype=torch.int64, device=latents.device)
    for row in range(0, rows, tile_rows):
        tile = latents[row : row + tile_rows] - center
        best: Tensor | None = None
        chosen = indices[row : row + tile_rows]
        for code in range(0, codes, tile_codes):
            block = factors[code : code + tile_codes]
            scores = buffer[: tile.shape[0] * block.shape[0]].view(tile.shape[0], block.shape[0])
            torch.addmm(half_norms[code : code + tile_codes], tile, block.T, alpha=-1, out=scores)
            if temperature:
                # Gumbel-max: -log of an exponential variate is a Gumbel variate.
                noise = torch.empty_like(scores).exponential_(generator=generator)
                scores.add_(noise.log_(), alpha=temperature)
            if tile_codes == codes:
                torch.argmin(scores, 1, out=chosen)
                break
            value, index = scores.min(1)
            if best is None:
                best = value
                chosen.copy_(index)
            else:
                better = value < best
                best = torch.where(better, value, best)
                chosen.copy_(torch.where(better, index + code, chosen))
    return indices
