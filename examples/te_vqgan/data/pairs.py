"""Pairs of image and caption, each a pure function of the data set's arguments and of its row.

Pixels and texts exist only while they are used. A training that keeps the image tokens of all rows asks for rows
and captions alone and renders nothing.

Shape letters: B rows, T caption tokens, P = 5 places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from examples.te_vqgan.data import heldout
from examples.te_vqgan.data.caption_parser import parse
from examples.te_vqgan.data.caption_tokens import CaptionTokenizer
from examples.te_vqgan.data.captions import Grammar
from examples.te_vqgan.data.quadrants import QuadrantDataset
from examples.te_vqgan.data.recipes import LAYOUTS
from examples.te_vqgan.data.sources import SPLITS, DigitSource
from examples.te_vqgan.runs.checks import require, require_int

__all__ = ["CaptionedImages"]

# Keys of random numbers, after those of the images that are made from the same seed.
_CAPTIONS, _CHOICES = 16, 17


class CaptionedImages:
    """One split of the paper's image-caption pairs, held-out combinations kept apart.

    Every image has several captions. Training draws one of them whenever it sees the image, evaluation uses the
    first. Caption k of a row depends on the arguments below, the row and k, on nothing else.

    Args:
        source: the digits; ten classes.
        split: "train", "validation" or "test".
        canvas_size: S in pixels, a multiple of 32; 64 in the paper.
        size: number of images; by default the paper's.
        seed: >= 0; of images, captions and the order of both.
        layouts: names out of :data:`~examples.te_vqgan.data.recipes.LAYOUTS`, equally likely.
        captions_per_image: at least 1; the paper does not tell its number.
        style: of the captions, one of :data:`~examples.te_vqgan.data.captions.STYLES`.
        allowed: (class, place, colour) combinations that may occur; by default those of ``split``,
            :func:`~examples.te_vqgan.data.heldout.allowed`. Another table shows, say, the test's digits in
            combinations that training has.

    Attributes:
        dataset: the images; ``dataset.batch(step, B)`` draws those of ``rows(step, B)``.
        grammar: writes the captions.
        tokenizer: of the captions; the same for all splits, sizes and seeds.

    Raises:
        ValueError: an option out of range, or what the parts refuse.

    Source: Shin et al. 2021, "Data Construction".
    """

    dataset: QuadrantDataset
    grammar: Grammar
    tokenizer: CaptionTokenizer
    captions_per_image: int

    def __init__(
        self,
        source: DigitSource,
        split: str,
        *,
        canvas_size: int = 64,
        size: int | None = None,
        seed: int = 0,
        layouts: Sequence[str] = LAYOUTS,
        captions_per_image: int = 5,
        style: str = "full",
        allowed: NDArray[np.bool_] | None = None,
    ) -> None:
        require_int("captions_per_image", captions_per_image, 1)
        self.dataset = QuadrantDataset(
            source,
            split,
            canvas_size=canvas_size,
            size=size,
            seed=seed,
            layouts=layouts,
            allowed=heldout.allowed(split, len(source.class_names)) if allowed is None else allowed,
        )
        self.grammar = Grammar(source.class_names, style)
        self.tokenizer = CaptionTokenizer(self.grammar)
        self.captions_per_image = captions_per_image
        # 12 MB for the paper's 300,000 rows: far cheaper than a generator for each row of each batch.
        self._numbers = self._rng(_CAPTIONS).integers(2**63, size=(len(self.dataset), captions_per_image))

    def __len__(self) -> int:
        return len(self.dataset)

    def rows(self, step: int, batch_size: int) -> NDArray[np.int64]:
        """The rows of training batch ``step``, as ``QuadrantDataset.row_batch``; (B,)."""
        return self.dataset.row_batch(step, batch_size)

    def caption_tokens(self, rows: NDArray[np.int64], step: int) -> Tensor:
        """The captions of training batch ``step``, one drawn for each row.

        Args:
            rows: of the batch, as from :meth:`rows`.
            step: >= 0; the same rows and step give the same captions.

        Shape:
            rows: (B,). result: (B, T) int64.

        Raises:
            ValueError: a negative step, or a row that is not there.
        """
        require_int("step", step, 0)
        choices = self._rng(_CHOICES, step).integers(self.captions_per_image, size=len(rows))
        return self.tokenizer.encode(self.captions(rows, choices))

    def batch(self, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Images and caption tokens of training batch ``step``: (B, 3, S, S) float32 and (B, T) int64."""
        rows = self.rows(step, batch_size)
        return self.dataset.images.render(self.dataset.recipes[rows]), self.caption_tokens(rows, step)

    def first_captions(self, start: int, stop: int) -> list[str]:
        """The first captions of rows ``start`` to ``stop``, for evaluation; fewer at the table's end."""
        return self.captions(np.arange(len(self))[start:stop], 0)

    def captions(self, rows: NDArray[np.int64], numbers: NDArray[np.int64] | int) -> list[str]:
        """Caption ``numbers`` of ``rows``.

        Args:
            rows: in [0, size).
            numbers: in [0, captions_per_image); one for all rows, or one for each.

        Shape:
            rows: (B,). numbers: (B,) or (). result: B captions.

        Raises:
            ValueError: a row or a number that is not there.
        """
        _require_indices("numbers", numbers, self.captions_per_image)
        classes, colors = self.classes_colors(rows)
        return self.grammar.write_numbered(classes, colors, self._numbers[rows, numbers])

    def parse(self, captions: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
        """What ``captions``, any texts, say of each place, read as those of the grammar are meant.

        Shape:
            captions: N of them. result: classes (N, P) int64 and colours (N, P) int8, ``EMPTY`` where nothing is.
        """
        return parse(captions, self.grammar.class_names, default_place=self.grammar.default_place)

    def classes_colors(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
        """What ``rows`` show: classes (B, P) int64 and colours (B, P) int8, ``EMPTY`` where nothing is.

        Raises:
            ValueError: a row that is not there.
        """
        _require_indices("rows", rows, len(self))
        recipe = self.dataset.recipes[rows]
        return self.dataset.classes(recipe), recipe.colors

    def _rng(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.dataset.seed, SPLITS.index(self.dataset.split), *purpose])


def _require_indices(name: str, values: Any, bound: int) -> None:
    # Negative ones would silently count from the end.
    indices = np.asarray(values)
    require(indices.dtype.kind == "i", name, "signed integers", indices.dtype)
    for extreme in (indices.min(initial=0), indices.max(initial=0)):
        require(0 <= extreme < bound, name, f"in [0, {bound})", extreme)
