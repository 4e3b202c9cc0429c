"""Product quantization: the channels are split into groups, and each group has its own quantizer.

Shape letters: B batch, C channels of a latent vector, C_g of group g, G groups, h w token grid, N latent vectors,
Q indices per vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from te_quant._checks import require, require_int
from te_quant.quantizers._combined import (
    CombinedQuantizer,
    Lifecycle,
    columns_of,
    part_codes,
    part_terms,
    require_parts,
    width,
)
from te_quant.quantizers._rows import Rows
from te_quant.quantizers.base import Losses, NonfiniteMode, Quantized, Quantizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["ProductQuantizer"]


class ProductQuantizer(CombinedQuantizer):
    """Split the channels into groups and quantize each with its own quantizer.

    G codebooks of K codes give K^G combinations at the search cost of one codebook. Any quantizers will do, also
    combined ones: a product of :class:`~te_quant.ResidualVectorQuantizer` is grouped residual quantization.

    Args:
        quantizers: one quantizer for each group, in the order of the channels. Their ``code_dim`` may differ, and
            so may their classes.
        num_groups: G, for one quantizer that serves all groups: ``ProductQuantizer([quantizer], num_groups=4)``.
            None takes G from ``quantizers``.
        channel_dim: the axis of ``latents`` that holds C: 1 for (B, C, h, w), -1 for (B, N, C). Both read (N, C).
            That of every quantizer inside.
        nonfinite: what to do about NaN and infinite latents, as for :class:`~te_quant.VectorQuantizer`.
        process_group: the processes over which statistics are summed. ``None`` is torch.distributed's default
            group, looked up at each call, and only this process when there is none. That of every quantizer
            inside.

    Shape:
        latents: (B, C, h, w), (B, N, C), (N, C) or up to rank 5, with C the sum of the ``code_dim`` of the groups,
            of the quantizers' dtype or in half precision, which is computed in float32.
        quantized: as latents, in their memory format, contiguous or channels-last. codes: the same in the
            quantizers' dtype. losses: (), the mean over the channels. indices: the latents' shape without the
            channel axis and with Q behind, int64: those of group 0, then those of group 1, and so on; all -1
            where masked. ``decode`` wants all of them.

    Attributes:
        quantizers: the quantizers that were given. Each is set by itself, for example
            ``quantizer.quantizers[0].set_codebook(codes)``. One in evaluation mode, frozen or inside its own
            ``accumulate()`` stands still while the others move.
        num_quantizers: Q, the number of indices of a token: G, or more where a quantizer inside has several.
        num_codes: the largest K inside.
        codebook_sizes: K of each of the Q indices.

    Raises:
        ValueError: the options of a quantizer inside contradict those of the product, axis ``channel_dim`` of
            latents is not C, the rank or device does not fit, or latents are not finite.
        TypeError: quantizers are no sequence of quantizers; latents are not floating point, or of another dtype.

    Source: Jégou et al. 2011, Product quantization for nearest neighbor search, Section II-B; a product of
        residual quantizers is that of Yang et al. 2023, arXiv:2305.02765 (group-residual vector quantization).

    Example:
        >>> from te_quant import FSQ, ProductQuantizer, VectorQuantizer
        >>> quantizer = ProductQuantizer([VectorQuantizer(num_codes=512, code_dim=8), FSQ((8, 5, 5))])
        >>> output = quantizer(torch.randn(2, 11, 4, 4))
        >>> output.indices.shape
        torch.Size([2, 4, 4, 2])
        >>> quantizer.codebook_sizes
        (512, 200)
    """

    _fixed = (*CombinedQuantizer._fixed, "num_groups")

    def __init__(
        self,
        quantizers: Sequence[Quantizer],
        *,
        num_groups: int | None = None,
        channel_dim: int = 1,
        nonfinite: NonfiniteMode | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        wanted = {"channel_dim": channel_dim, "nonfinite": nonfinite, "process_group": process_group}
        reuse = "pass it once with num_groups=G to serve all groups"
        given = require_parts("quantizers", quantizers, reuse=reuse, **wanted)
        if num_groups is not None:
            num_groups = require_int("num_groups", num_groups, 1)
            require(len(given) == 1, "num_groups", "None where several quantizers are given", num_groups)
        parts = given * (num_groups or 1)
        super().__init__(
            parts,
            sum(part.code_dim for part in parts),
            channel_dim=channel_dim,
            nonfinite=nonfinite,
            process_group=process_group,
        )
        self.quantizers = nn.ModuleList(given)
        self.num_groups = num_groups
        scales = [_per_channel(part) for part in parts]
        self.residual_scale = tuple(scale for own in scales for scale in own)

    def search(self, rows: Rows) -> Tensor:
        """Return the indices of each row, Q last."""
        found = [columns_of(part, part.search(own)) for part, own in self._split(rows)]
        return torch.cat(found, dim=1)

    def look_up(self, indices: Tensor) -> Tensor:
        """Return the codes of the groups next to each other: (..., Q) -> (..., C); -1 gives zeros."""
        columns = indices.split([width(part) for part in self._parts()], dim=-1)
        codes = [part_codes(*pair) for pair in zip(self._parts(), columns, strict=True)]
        return torch.cat(codes, dim=-1)

    def project(self, vectors: Tensor) -> Tensor:
        """Project each group as its quantizer does."""
        return self._map("project", vectors)

    def project_residual(self, vectors: Tensor) -> Tensor:
        """Project each group as its quantizer does."""
        return self._map("project_residual", vectors)

    def to_code_units(self, projected: Tensor) -> Tensor:
        """Let each quantizer choose the units of its group."""
        return self._map("to_code_units", projected)

    def quantize(self, rows: Rows, generator: torch.Generator | None) -> Quantized:
        """Quantize; changes no state.

        Args:
            rows: the projected latents.
            generator: randomness of the quantizers inside.
        """
        steps = [(part, own, part.quantize(own, generator)) for part, own in self._split(rows)]
        results = [result for _, _, result in steps]
        shares = [part.code_dim / self.code_dim for part in self._parts()]
        losses = Losses(
            *(
                torch.stack([share * term for share, term in zip(shares, terms, strict=True)]).sum()
                for terms in zip(*(result.losses for result in results), strict=True)
            )
        )
        return Quantized(
            surrogate=torch.cat([result.surrogate for result in results], dim=1),
            indices=torch.cat([columns_of(part, result.indices) for part, _, result in steps], dim=1),
            codes=torch.cat([result.codes for result in results], dim=1),
            losses=losses,
            memo=steps,
        )

    def options(self) -> dict[str, object]:
        """Return what the constructor was given, by name; see the base class."""
        return {**super().options(), "quantizers": list(self.quantizers)}

    def _cure_of(self, name: str) -> str:  # noqa: ARG002
        return "set on each of quantizer.quantizers, which have their own"

    def _parts(self) -> list[Quantizer]:
        return cast("list[Quantizer]", list(self.quantizers)) * (self.num_groups or 1)

    def _lengths(self) -> list[int]:
        return [self.num_quantizers]

    def _sizes(self) -> list[int]:
        return [part.code_dim for part in self._parts()]

    def _map(self, method: str, vectors: Tensor) -> Tensor:
        groups = zip(self._parts(), vectors.split(self._sizes(), dim=1), strict=True)
        return torch.cat([getattr(part, method)(own) for part, own in groups], dim=1)

    def _split(self, rows: Rows) -> Iterator[tuple[Quantizer, Rows]]:
        """Each quantizer with the rows of its group."""
        vectors, searchable = (part.split(self._sizes(), dim=1) for part in (rows.vectors, rows.searchable))
        for part, *own in zip(self._parts(), vectors, searchable, strict=True):
            # A search reads its rows several times, each of them faster if they are contiguous.
            yield part, Rows(own[0].contiguous(), own[1].contiguous(), rows.weights, rows.grid)

    def _loss_terms(self, rows: Rows, indices: Tensor) -> dict[str, Tensor]:
        terms = {}
        columns = indices.split([width(part) for part in self._parts()], dim=-1)
        for group, ((part, own), chosen) in enumerate(zip(self._split(rows), columns, strict=True)):
            for name, term in part_terms(part, own, chosen).items():
                terms[f"groups.{group}.{name}"] = term * (part.code_dim / self.code_dim)
        return terms

    def _visit(self, rows: Tensor, lifecycle: Lifecycle) -> None:
        groups = rows.split(self._sizes(), dim=1)
        if self.num_groups is None:
            for part, own in zip(self._parts(), groups, strict=True):
                lifecycle.visit(part, own.contiguous())
            return
        lifecycle.visit(self._parts()[0], torch.cat(groups))
        # One codebook answers for all groups.
        lifecycle.revived += lifecycle.revived[-width(self._parts()[0]) :] * (self.num_groups - 1)


def _per_channel(part: Quantizer) -> tuple[float, ...]:
    scale = part.residual_scale
    return scale if isinstance(scale, tuple) else (scale,) * part.code_dim
