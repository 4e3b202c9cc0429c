"""Arguments of a wrong kind, of which torch would say something that names no argument, or nothing at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from te_quant import (
    GPT,
    AutoencoderConfig,
    CodebookUsage,
    GPTConfig,
    ResidualVectorQuantizer,
    Segment,
    SimVQ,
    VQAutoencoder,
)
from te_quant.equivariance import numerical_floor
from te_quant.filters import binomial_kernel, filter2d, fourier_resample, pad2d
from te_quant.functional import nearest_code, perplexity, rotation_trick, straight_through
from te_quant.layers import BlurPool2d, BlurUpsample2d
from te_quant.shifts import fourier_shift, place
from tests.helpers import exactly, plain_quantizer, plain_residual

IMAGES = torch.zeros(1, 1, 4, 4)
PIXELS = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
TAPS = torch.ones(3)
ROWS, CODES = torch.zeros(4, 8), torch.zeros(2, 8)
NO_TOKENS = torch.zeros(1, 0, dtype=torch.int64)


def gpt() -> GPT:
    return GPT(GPTConfig((Segment("image", 4, (2, 2), "learned"),), width=8, depth=1, num_heads=1)).eval()


def usage_with(*counts: int) -> None:
    CodebookUsage(2).merge(torch.tensor(counts))


REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "integer images": (lambda: BlurPool2d()(PIXELS), TypeError, "images must be floating point, got torch.uint8."),
    "integer images, up": (
        lambda: BlurUpsample2d()(PIXELS),
        TypeError,
        "images must be floating point, got torch.uint8.",
    ),
    "integer kernel": (
        lambda: binomial_kernel(3, dtype=torch.int64),
        TypeError,
        "dtype must be floating point, got torch.int64.",
    ),
    "integer taps": (
        lambda: filter2d(IMAGES, TAPS.int(), padding_mode="zeros"),
        TypeError,
        "taps must be floating point, got torch.int32.",
    ),
    "no taps": (
        lambda: filter2d(IMAGES, TAPS[:0], padding_mode="zeros"),
        ValueError,
        "taps must be at least one, got none.",
    ),
    "no stride": (
        lambda: filter2d(IMAGES, TAPS, stride=0, padding_mode="zeros"),
        ValueError,
        "stride must be an int >= 1, got 0.",
    ),
    "negative margin": (
        lambda: pad2d(IMAGES, (1, -1, 0, 0), "zeros"),
        ValueError,
        "margins must be at least 0 each, got (1, -1, 0, 0).",
    ),
    "one side": (
        lambda: fourier_resample(IMAGES, 4),  # type: ignore[arg-type]
        TypeError,
        "size must be a pair of ints, got 4.",
    ),
    "one shift": (
        lambda: fourier_shift(IMAGES, 0.5),  # type: ignore[arg-type]
        TypeError,
        "shift must be a pair of numbers, got 0.5.",
    ),
    "broken ground": (
        lambda: place(PIXELS, (0, 0), size=(8, 8), fill=0.5),
        ValueError,
        "fill must be an integer in [0, 255] for torch.uint8, got 0.5.",
    ),
    "straight through other shapes": (
        lambda: straight_through(ROWS, CODES),
        ValueError,
        "codes must be of shape (4, 8) as the latents, got shape (2, 8).",
    ),
    "rotation of other shapes": (
        lambda: rotation_trick(ROWS, CODES),
        ValueError,
        "codes must be of shape (4, 8) as the latents, got shape (2, 8).",
    ),
    "no generator": (
        lambda: nearest_code(ROWS, CODES, temperature=0.1, generator=5),  # type: ignore[arg-type]
        TypeError,
        "generator must be a torch.Generator, got 5.",
    ),
    "dropout by a word": (
        lambda: ResidualVectorQuantizer(4, 4, 2, quantizer_dropout="half"),  # type: ignore[arg-type]
        TypeError,
        "quantizer_dropout must be a bool or a share in [0, 1], got 'half'.",
    ),
    "shared by a word": (
        lambda: ResidualVectorQuantizer(4, 4, 2, shared_codebook="no"),  # type: ignore[arg-type]
        TypeError,
        "shared_codebook must be a bool, got 'no'.",
    ),
    "active by a word": (
        lambda: plain_quantizer(4, 4, orthogonal_reg=1, orthogonal_active_only="no"),  # type: ignore[arg-type]
        TypeError,
        "orthogonal_active_only must be a bool, got 'no'.",
    ),
    **{
        f"frozen by a word: {type(quantizer).__name__}": (
            lambda quantizer=quantizer: quantizer.freeze("no"),  # type: ignore[misc, union-attr]
            TypeError,
            "frozen must be a bool, got 'no'.",
        )
        for quantizer in (plain_quantizer(4, 4), SimVQ(4, 4), plain_residual(4, 4, 2))
    },
    "a word as processes": (
        lambda: SimVQ(4, 4, process_group="all"),  # type: ignore[arg-type]
        TypeError,
        "process_group must be a torch.distributed.ProcessGroup, got 'all'.",
    ),
    **{
        f"a seed as generator: {name}": (call, TypeError, "generator must be a torch.Generator, got 3.")
        for name, call in {
            "codebook": lambda: plain_quantizer(4, 4, generator=3),  # type: ignore[arg-type]
            "coefficients": lambda: SimVQ(4, 4, generator=3),  # type: ignore[arg-type]
            "forward": lambda: plain_quantizer(4, 8, temperature=1.0)(ROWS, generator=3),
            "dropout": lambda: ResidualVectorQuantizer(4, 8, 2, quantizer_dropout=True)(ROWS, generator=3),
            "k-means": lambda: plain_quantizer(4, 8).kmeans_init(ROWS, generator=3),  # type: ignore[arg-type]
            "revival": lambda: plain_quantizer(4, 8).revive_dead_codes(ROWS, generator=3),  # type: ignore[arg-type]
            "GPT": lambda: gpt().generate(NO_TOKENS, generator=3),  # type: ignore[arg-type]
        }.items()
    },
    "two margins": (
        lambda: pad2d(IMAGES, (1, 1), "zeros"),  # type: ignore[arg-type]
        ValueError,
        "margins must be four ints (left, right, top, bottom), got (1, 1).",
    ),
    "one margin": (
        lambda: pad2d(IMAGES, 1, "circular"),  # type: ignore[arg-type]
        TypeError,
        "margins must be four ints, got 1.",
    ),
    "a size of one side": (
        lambda: fourier_resample(IMAGES, (4,)),  # type: ignore[arg-type]
        ValueError,
        "size must be a pair (height, width), got (4,).",
    ),
    "complex counts": (
        lambda: perplexity(torch.ones(3) * 1j),
        TypeError,
        "histogram must be real, got torch.complex64.",
    ),
    "a number as order": (
        lambda: gpt()(NO_TOKENS, order=3),
        TypeError,
        "order must be a sequence of names of segments, got 3.",
    ),
    "a number as cache": (
        lambda: gpt()(NO_TOKENS, cache=3),
        TypeError,
        "cache must be a KeyValueCache, got 3.",
    ),
    "a number as cache of what follows": (
        lambda: gpt().next_logits(3),  # type: ignore[arg-type]
        TypeError,
        "cache must be a KeyValueCache, got 3.",
    ),
    "a word as dtype": (
        lambda: gpt().new_cache(2, dtype="float32"),  # type: ignore[arg-type]
        TypeError,
        "dtype must be a torch.dtype, got 'float32'.",
    ),
    "negative counts": (lambda: usage_with(3, -1), ValueError, "histogram must be counts >= 0, got -1."),
    "no autoencoder config": (
        lambda: VQAutoencoder({}),  # type: ignore[arg-type]
        TypeError,
        "config must be an AutoencoderConfig, got {}.",
    ),
    "no GPT config": (lambda: GPT({}), TypeError, "config must be a GPTConfig, got {}."),  # type: ignore[arg-type]
    "a list as mask": (
        lambda: gpt()(torch.zeros(1, 1, dtype=torch.int64), mask=[True]),
        TypeError,
        "mask must be a tensor, got list.",
    ),
    "a number as variants": (
        lambda: numerical_floor(lambda x: x[:, 0].long(), IMAGES, num_codes=1, variants=3),  # type: ignore[arg-type]
        TypeError,
        "variants must be a mapping from names to callables or batch sizes, got 3.",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_wrong_kinds_are_refused_by_name(name: str) -> None:
    """One sentence: which argument, what was expected, what came."""
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=exactly(message)):
        call()


def test_what_lies_beside_the_refusals_is_accepted() -> None:
    """The nearest valid call to some of them."""
    assert place(PIXELS, (0, 0), size=(8, 8), fill=1.0).sum() == 64
    assert torch.equal(straight_through(ROWS, ROWS + 1), ROWS + 1)
    assert pad2d(IMAGES, (1, 0, 0, 0), "zeros").shape == (1, 1, 4, 5)
    usage_with(3, 0)
    assert (
        not VQAutoencoder(AutoencoderConfig(base_channels=8, norm_groups=1, code_dim=4))
        .quantizer.freeze(frozen=False)
        .frozen
    )
