"""The public conformance check: a stranger's quantizer passes it, and broken ones fail by the broken promise.

Shape letters: C code size, N latent vectors.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from te_quant import Quantizer, QuantizerOutput, VectorQuantizer
from te_quant.quantizers import Losses, Quantized, Rows, distance_losses
from te_quant.testing import QUANTIZER_CHECKS, check_quantizer


class Grid(Quantizer):
    """A stranger's quantizer: the nearest point of a learnt, evenly spaced grid on one line through the origin."""

    def __init__(self, num_codes: int = 9, code_dim: int = 3, *, weight: float = 0.25, **layout: Any) -> None:
        super().__init__(num_codes, code_dim, **layout)
        self.weight = weight
        self.direction = nn.Parameter(torch.ones(code_dim))

    def search(self, rows: Rows) -> Tensor:
        """Return the nearest multiple of the direction."""
        direction = self.direction.detach().to(rows.searchable.dtype)
        steps = rows.searchable @ direction / direction.square().sum()
        # Not a number has no nearest multiple: it gets the middle one.
        steps = torch.where(steps.isnan(), 0.0, steps).round() + self.num_codes // 2
        return steps.clamp(0, self.num_codes - 1).long()

    def look_up(self, indices: Tensor) -> Tensor:
        """Return the multiples."""
        direction = self.direction.to(torch.promote_types(self.direction.dtype, torch.float32))
        return (indices - self.num_codes // 2).unsqueeze(-1) * direction

    def losses(self, rows: Rows, codes: Tensor, indices: Tensor) -> Losses:
        """Return both distances."""
        return distance_losses(rows, codes, self.weight, codebook_follows=True)

    def options(self) -> dict[str, Any]:
        """Name the layout, which the constructor passes on."""
        own = {"num_codes": self.num_codes, "code_dim": self.code_dim, "weight": self.weight}
        return {**own, "channel_dim": self.channel_dim, "nonfinite": self.nonfinite}


@pytest.mark.parametrize("check", QUANTIZER_CHECKS)
def test_a_strangers_quantizer_passes(check: str) -> None:
    """A class of thirty lines keeps every promise that the base class makes for it."""
    QUANTIZER_CHECKS[check](Grid)


class Signs(Quantizer):
    """A quantizer without any tensor."""

    def __init__(self, code_dim: int = 3, *, channel_dim: int = 1, nonfinite: Any = None) -> None:
        super().__init__(2**code_dim, code_dim, channel_dim=channel_dim, nonfinite=nonfinite)

    def search(self, rows: Rows) -> Tensor:
        """Return the signs as bits."""
        return ((rows.searchable > 0) * 2 ** torch.arange(self.code_dim)).sum(1)

    def look_up(self, indices: Tensor) -> Tensor:
        """Return -1 and 1."""
        return (indices.unsqueeze(-1) >> torch.arange(self.code_dim) & 1) * 2.0 - 1


class Counting(Signs):
    """Counts in a buffer, which stays in float32 and says nothing about latents."""

    statistics = ("usage",)

    def __init__(self, code_dim: int = 3, *, channel_dim: int = 1, nonfinite: Any = None) -> None:
        super().__init__(code_dim, channel_dim=channel_dim, nonfinite=nonfinite)
        self.register_buffer("usage", torch.zeros(self.num_codes))

    def record(self, rows: Rows, result: Quantized) -> None:
        """Count the rows that count."""
        weights = torch.ones(len(result.indices)) if rows.weights is None else rows.weights.squeeze(1)
        self.usage.index_add_(0, result.indices, weights.to(self.usage.dtype))


@pytest.mark.parametrize("check", QUANTIZER_CHECKS)
@pytest.mark.parametrize("stranger", [Signs, Counting])
def test_quantizers_without_a_codebook_pass(stranger: Any, check: str) -> None:
    """No tensor is needed to know the dtype of the codes."""
    QUANTIZER_CHECKS[check](stranger)


def test_all_checks_are_run_and_leave_the_random_state_alone() -> None:
    """One call for all of them."""
    before = torch.get_rng_state()
    check_quantizer(partial(Grid, 5, 2))
    assert torch.equal(before, torch.get_rng_state())


class NoOptions(Grid):
    """Loses an option."""

    def __init__(self, **layout: Any) -> None:
        super().__init__(**layout)
        del self.weight

    def losses(self, rows: Rows, codes: Tensor, indices: Tensor) -> Losses:
        """Return both distances."""
        return distance_losses(rows, codes, 1.0, codebook_follows=True)


class NegativeLoss(Grid):
    """Rewards distance."""

    def losses(self, rows: Rows, codes: Tensor, indices: Tensor) -> Losses:
        """Return what is below zero."""
        losses = super().losses(rows, codes, indices)
        return losses._replace(commitment=-losses.commitment)


class OtherCodes(Grid):
    """Returns codes that its indices do not decode to."""

    def quantize(self, rows: Rows, generator: torch.Generator | None) -> Quantized:
        """Add the last bit of a difference."""
        result = super().quantize(rows, generator)
        return result._replace(codes=result.codes * (1 + 1e-6))


class Positional(Grid):
    """Looks at the place of a token."""

    def search(self, rows: Rows) -> Tensor:
        """Add one to every other row."""
        return (super().search(rows) + torch.arange(len(rows.searchable)) % 2) % self.num_codes


class MovesInEvaluation(Grid):
    """Counts in evaluation."""

    def __init__(self, **layout: Any) -> None:
        super().__init__(**layout)
        self.register_buffer("calls", torch.zeros(()))

    def quantize(self, rows: Rows, generator: torch.Generator | None) -> Quantized:
        """Count."""
        self.calls += 1
        return super().quantize(rows, generator)


class MovesInEncode(MovesInEvaluation):
    """Counts while it encodes, which nothing but a state dict shows."""

    def quantize(self, rows: Rows, generator: torch.Generator | None) -> Quantized:
        """Do not count here."""
        return Grid.quantize(self, rows, generator)

    def search(self, rows: Rows) -> Tensor:
        """Count."""
        self.calls += self.training and not torch.is_grad_enabled()
        return super().search(rows)


class NoGradient(Grid):
    """Returns codes without a path to the latents."""

    def quantize(self, rows: Rows, generator: torch.Generator | None) -> Quantized:
        """Cut the path."""
        result = super().quantize(rows, generator)
        return result._replace(surrogate=result.codes.detach())


class NeverFrozen(Grid):
    """Goes on learning."""

    def freeze(self, frozen: bool = True) -> NeverFrozen:
        """Only note it."""
        self.frozen = frozen
        return self


class MeanOfEmpty(Grid):
    """Divides by the number of rows."""

    def losses(self, rows: Rows, codes: Tensor, indices: Tensor) -> Losses:
        """Take means, of nothing too."""
        losses = super().losses(rows, codes, indices)
        return losses._replace(commitment=(rows.vectors - codes.detach()).square().mean())


class CountsSkipped(Grid):
    """Forgets the weights of the rows."""

    def losses(self, rows: Rows, codes: Tensor, indices: Tensor) -> Losses:
        """Count all rows."""
        return super().losses(rows._replace(weights=None), codes, indices)


class AcceptsAnyIndex(Grid):
    """Does not look at indices."""

    def _check_indices(self, indices: Tensor) -> Tensor:
        return indices.long()


class AcceptsAnyLatents(Grid):
    """Does not look at latents."""

    def _check_latents(self, latents: Tensor) -> None:
        """Look at nothing."""


class HiddenState(Grid):
    """Remembers outside of its state dict."""

    def __init__(self, **layout: Any) -> None:
        super().__init__(**layout)
        self.steps = 0

    def quantize(self, rows: Rows, generator: torch.Generator | None) -> Quantized:
        """Change with the number of steps."""
        self.steps += self.training
        result = super().quantize(rows, generator)
        return result._replace(losses=result.losses._replace(regularization=torch.tensor(float(self.steps))))


class IgnoresTheGenerator(VectorQuantizer):
    """Draws from the global state."""

    def quantize(self, rows: Rows, generator: torch.Generator | None) -> Quantized:
        """Forget the generator."""
        return super().quantize(rows, None)


class Crashes(Grid):
    """Raises an error of its own."""

    def look_up(self, indices: Tensor) -> Tensor:
        """Fail."""
        raise RuntimeError("of a stranger")


class WrongLayout(Grid):
    """Returns indices of every image as one row."""

    def _lay_out_indices(self, indices: Tensor, grid: tuple[int, ...]) -> Tensor:
        return indices.view(grid[0], -1)


class IgnoresTheMask(Grid):
    """Counts every token."""

    def _kept(self, latents: Tensor, mask: Tensor | None) -> Tensor | None:
        return None


class HidesTheMask(Grid):
    """Returns indices and codes for every token, although losses and statistics follow the mask."""

    def _lay_out_indices(self, indices: Tensor, grid: tuple[int, ...]) -> Tensor:
        return super()._lay_out_indices(indices.clamp_min(0), grid)


class CountsMaskedCodes(Grid):
    """Counts the codes of masked tokens, which are those of zero."""

    def losses(self, rows: Rows, codes: Tensor, indices: Tensor) -> Losses:
        """Add a term of all rows."""
        losses = super().losses(rows, codes, indices)
        return losses._replace(regularization=(codes - 1).square().sum() / 100)


class LooksAtStrides(Grid):
    """Depends on the memory order of the latents."""

    def forward(self, latents: Tensor, **options: Any) -> QuantizerOutput:
        """Scale what is not contiguous."""
        return super().forward(latents if latents.is_contiguous() else latents * 3, **options)


@pytest.mark.parametrize(
    ("broken", "check", "match"),
    [
        (lambda **_: nn.Identity(), "is-a-quantizer", r"it is a te_quant\.Quantizer .* found a Identity"),
        (NoOptions, "is-a-quantizer", "keeps every option as an attribute .* no attribute 'weight'"),
        (
            NegativeLoss,
            "outputs",
            "documented shapes, dtypes and losses; commitment_loss is .* not one finite number >= 0",
        ),
        (Crashes, "decoding", "equal bit for bit; RuntimeError 'of a stranger' was raised"),
        (WrongLayout, "outputs", r"indices are torch\.int64 of shape \(3, 20\)"),
        (OtherCodes, "decoding", r"decode\(indices\), codes and quantized are equal bit for bit; decode"),
        (Positional, "token-shifts", "quantized independently of where they lie; indices do not move along"),
        (LooksAtStrides, "memory-order", "permuted, strided and expanded latents .* permuted latents give"),
        (MovesInEvaluation, "encoding", "forward in evaluation changes the state"),
        (MovesInEncode, "encoding", "encode in training changes the state"),
        (NoGradient, "gradients", r"gradients reach the latents .* quantized has no gradient path"),
        (MeanOfEmpty, "empty-batches", "an empty batch gives empty results, a finite loss .* the losses are"),
        (AcceptsAnyLatents, "wrong-latents", "are refused by name; ValueError 'latents must be of shape"),
        (
            AcceptsAnyIndex,
            "wrong-indices",
            r"indices that belong to no code.* ValueError .* got no error",
        ),
        (CountsSkipped, "skipped-latents", "as without the vectors that are not finite; codes, loss"),
        (CountsSkipped, "masked-latents", "as without the masked tokens.* codes, loss, gradient or state differ"),
        (CountsMaskedCodes, "masked-latents", "as without the masked tokens.* codes, loss, gradient"),
        (IgnoresTheMask, "masked-latents", "as without the masked tokens.* 'latents must be finite"),
        (
            IgnoresTheMask,
            "wrong-masks",
            r"'mask must be bool, .*; pass mask\.bool\(\)\.' was expected, got no",
        ),
        (HidesTheMask, "masked-latents", "the index of a masked token is not -1"),
        (MovesInEvaluation, "freezing", "a frozen quantizer changes nothing in training.* the state changes"),
        (NeverFrozen, "freezing", r"takes no gradients.* \['direction'\] take gradients"),
        (HiddenState, "state-dicts", "a fresh quantizer that loads the state dict .* its next step differs"),
        (
            partial(IgnoresTheGenerator, 8, 3, temperature=10.0),
            "generators",
            "takes its randomness from generator .* two steps with equal generators differ",
        ),
    ],
)
def test_a_broken_promise_is_named(broken: Any, check: str, match: str) -> None:
    """The check that looks for it fails and says what it found."""
    with pytest.raises(AssertionError, match=match):
        QUANTIZER_CHECKS[check](broken)
