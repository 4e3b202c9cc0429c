"""Codebooks of vector-quantize-pytorch go on as they would have there.

Shape letters: C code size, K codes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from te_quant import LFQ, ResidualVectorQuantizer, VectorQuantizer
from te_quant.interop import load_vector_quantize, reverse_bits
from tests.helpers import exactly

peers = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")

K, C = 9, 4
# Settings of VectorQuantize, and the layout of its latents.
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "plain": ({}, (40, 3, C)),
    "straight-through": ({"rotation_trick": False, "commitment_weight": 0.25, "decay": 0.99}, (40, 3, C)),
    "image": ({"accept_image_fmap": True}, (5, C, 4, 6)),
    "channels-first": ({"channel_last": False}, (5, C, 24)),
    "cosine": ({"use_cosine_sim": True}, (40, 3, C)),
    "learnable": ({"learnable_codebook": True, "ema_update": False, "commitment_weight": 0.5}, (40, 3, C)),
    "penalty": (
        {"learnable_codebook": True, "ema_update": False, "orthogonal_reg_weight": 3.0},
        (40, 3, C),
    ),
    "replacing": ({"threshold_ema_dead_code": 1}, (40, 3, C)),
    "frozen": ({"freeze_codebook": True}, (40, 3, C)),
}


def trained(settings: dict[str, Any], shape: tuple[int, ...], steps: int = 3) -> nn.Module:
    """Theirs, after a few steps."""
    theirs: nn.Module = peers.VectorQuantize(dim=C, codebook_size=K, **settings)
    with torch.no_grad():
        theirs._codebook.embed.copy_(torch.randn(1, K, C))
        theirs._codebook.embed_avg.copy_(theirs._codebook.embed)
    for _ in range(steps):
        theirs(torch.randn(shape))
    return theirs


def step(quantizer: nn.Module, latents: Tensor) -> tuple[Any, ...]:
    """One training step with the gradient of the latents; the codebook moves by its own gradient if it has one."""
    latents = latents.clone().requires_grad_()
    output = quantizer(latents)
    quantized, indices, loss = output[:3]
    if isinstance(quantizer, VectorQuantizer):
        # Two terms of equal value, with the gradients of their one.
        assert quantizer.codebook_update == "ema" or output.codebook_loss == output.commitment_loss
        value = output.commitment_loss + output.regularization_loss
    else:
        value = loss.sum()
    (loss.sum() + quantized.pow(2).sum()).backward()
    with torch.no_grad():
        for parameter in quantizer.parameters():
            if parameter.grad is not None:
                parameter -= 0.3 * parameter.grad
                parameter.grad = None
    return quantized.detach(), indices, value.detach(), latents.grad


@pytest.mark.parametrize("name", CASES)
def test_the_next_steps_are_its_own(name: str) -> None:
    """Codes, indices, loss and gradient, and afterwards codebook and statistics."""
    settings, shape = CASES[name]
    theirs = trained(settings, shape)
    ours = load_vector_quantize(theirs)
    for _ in range(3):
        latents = torch.randn(shape)
        wanted, got = step(theirs, latents), step(ours, latents)
        assert torch.equal(got[1], wanted[1])
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
    ours.apply_pending()
    torch.testing.assert_close(ours.decode(torch.arange(K)), theirs.codebook, rtol=1e-5, atol=1e-6)
    if ours.codebook_update == "ema":
        torch.testing.assert_close(ours.usage, theirs._codebook.cluster_size[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.code_sums, theirs._codebook.embed_avg[0], rtol=1e-5, atol=1e-5)


def test_codes_alone_are_not_enough() -> None:
    """Negative control: with the codebook but not its sums, the next step goes elsewhere."""
    settings, shape = CASES["plain"]
    theirs = trained(settings, shape)
    ours = load_vector_quantize(theirs)
    ours.set_codebook(theirs.codebook)
    latents = torch.randn(shape)
    step(theirs, latents)
    step(ours, latents)
    ours.apply_pending()
    assert (ours.codebook - theirs.codebook).abs().max() > 0.01


# Sources


def into() -> VectorQuantizer:
    """A quantizer with the settings of the plain case."""
    return VectorQuantizer(
        K, C, decay=0.8, channel_dim=-1, gradient_estimator="rotation_trick", revival_threshold=0.0
    )


@pytest.mark.parametrize("source", ["state", "module", "pickle", "container", "safetensors"])
def test_every_source_says_the_same(source: str, tmp_path: Path) -> None:
    """Under a prefix, next to other weights."""
    theirs = nn.ModuleDict({"encoder": nn.Linear(2, 3), "vq": trained(*CASES["plain"])})
    given: Any = theirs
    if source == "state":
        given = theirs.state_dict()
    elif source in ("pickle", "container"):
        given = tmp_path / "model.pt"
        state = theirs.state_dict()
        torch.save(state if source == "pickle" else {"state_dict": state, "step": 3}, given)
    elif source == "safetensors":
        given = str(tmp_path / "model.safetensors")
        pytest.importorskip("safetensors.torch").save_file(theirs.state_dict(), given)
    ours = load_vector_quantize(given, prefix="vq.", into=into())
    wanted = load_vector_quantize(theirs["vq"])
    assert ours.options() == wanted.options()
    assert all(torch.equal(tensor, wanted.state_dict()[name]) for name, tensor in ours.state_dict().items())


def test_a_new_quantizer_is_on_the_device_of_the_codebook() -> None:
    """Not on the default one."""
    theirs = trained({}, (40, 3, C))
    torch.set_default_device("meta")
    try:
        quantizer = load_vector_quantize(theirs)
    finally:
        torch.set_default_device(None)
    assert {tensor.device.type for tensor in quantizer.state_dict().values()} == {"cpu"}


def test_what_is_filled_is_returned() -> None:
    """With its own settings, here other ones."""
    mine = VectorQuantizer(K, C, codebook_update="gradient", metric="cosine_raw")
    theirs = trained(*CASES["plain"])
    assert load_vector_quantize(theirs.state_dict(), into=mine) is mine
    assert torch.equal(mine.codebook.detach(), theirs.codebook)
    assert mine.codebook.requires_grad


def test_levels_of_a_residual_quantizer() -> None:
    """Each has its prefix; together they find the same codes."""
    theirs = peers.ResidualVQ(dim=C, codebook_size=K, num_quantizers=3).train()
    for _ in range(4):
        theirs(torch.randn(30, 5, C))
    theirs.eval()
    stages = [load_vector_quantize(theirs, prefix=f"layers.{level}.") for level in range(3)]
    ours = ResidualVectorQuantizer(
        stages=stages, channel_dim=-1, gradient_estimator=stages[0].gradient_estimator
    ).eval()
    latents = torch.randn(30, 5, C)
    quantized, indices, _ = theirs(latents)
    output = ours(latents)
    assert torch.equal(output.indices, indices)
    torch.testing.assert_close(output.quantized, quantized)


def test_modes_are_kept() -> None:
    """Training, evaluation, and a frozen codebook."""
    theirs = trained(*CASES["frozen"])
    assert load_vector_quantize(theirs).training
    assert load_vector_quantize(theirs).frozen
    assert not load_vector_quantize(theirs.eval()).training
    assert not load_vector_quantize(trained(*CASES["plain"])).frozen


# Refusals


def altered(change: Any, **settings: Any) -> dict[str, Tensor]:
    """A state dict of theirs, changed in place."""
    state = copy.deepcopy(trained(settings, (40, 3, C), steps=1).state_dict())
    change(state)
    return dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("_codebook.embed_avg"), "source must be complete (4 tensors), got none named '_codebook.embed_avg'."),  # noqa: E501
        (lambda s: s.update({"_codebook.batch_mean": torch.zeros(1)}), "source must be of 4 tensors, got unexpected '_codebook.batch_mean'."),  # noqa: E501
        (lambda s: s.update({"project_in.weight": torch.zeros(1)}), "source must be without projections, got 'project_in.weight'; load the codebook from a state dict without them, and apply them around the quantizer."),  # noqa: E501
        (lambda s: s.update({"_codebook.embed": torch.zeros(K, C)}), "_codebook.embed must be of shape (1, K, C), got shape (9, 4)."),  # noqa: E501
        (lambda s: s.update({"_codebook.cluster_size": torch.zeros(1, 3)}), "_codebook.cluster_size must be of shape (1, 9), got shape (1, 3)."),  # noqa: E501
        (lambda s: s.update({"_codebook.initted": torch.tensor(False)}), "_codebook.initted must be True, after the k-means start, got False."),  # noqa: E501
    ],
)  # fmt: skip
def test_other_tensors_are_refused_by_name(change: Any, message: str) -> None:
    """Missing, unexpected, or of another shape."""
    with pytest.raises(ValueError, match=exactly(message)):
        load_vector_quantize(altered(change), into=into())


def test_several_codebooks_are_refused() -> None:
    """With the cure."""
    theirs = peers.VectorQuantize(dim=8, codebook_size=K, heads=2, separate_codebook_per_head=True, codebook_dim=4)
    with pytest.raises(ValueError, match=r"_codebook.embed axis 0 must be 1, one codebook, got 2; load each"):
        load_vector_quantize(theirs.state_dict(), into=into())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 2, "dim": 8, "codebook_dim": 4}, "heads must be 1, got 2; put one quantizer per head into a ProductQuantizer"),  # noqa: E501
        ({"affine_param": True, "sync_affine_param": False}, "source must be of 4 tensors, got unexpected"),
        ({"commitment_use_cross_entropy_loss": True}, "commitment_use_cross_entropy_loss must be False, got True"),
        ({"codebook_diversity_loss_weight": 1.0}, "has_codebook_diversity_loss must be False, got True"),
        ({"orthogonal_reg_weight": 1.0}, "orthogonal_reg_weight must be 0 under ema_update, which undoes it, got 1"),  # noqa: E501
        ({"ema_update": False}, "learnable_codebook must be True with ema_update=False, got False"),
        ({"eps": 1e-3}, "eps must be 1e-05, got 0.001; pass into="),
        ({"threshold_ema_dead_code": 2}, "threshold_ema_dead_code must be below the average usage of a code, 1, got 2; pass into="),  # noqa: E501
        ({"stochastic_sample_codes": True}, "stochastic_sample_codes must be False without use_cosine_sim, got True"),  # noqa: E501
        ({"stochastic_sample_codes": True, "straight_through": True, "rotation_trick": False}, "straight_through must be False, got True"),  # noqa: E501
        ({"manual_ema_update": True}, r"manual_ema_update must be False, got True; use accumulate\(\)"),
    ],
)  # fmt: skip
def test_settings_without_an_equivalent_are_refused(settings: dict[str, Any], message: str) -> None:
    """By their names, most with a cure."""
    theirs = peers.VectorQuantize(**{"dim": C, "codebook_size": K, **settings})
    with pytest.raises(ValueError, match=message):
        load_vector_quantize(theirs)


def test_projections_of_a_module_are_refused() -> None:
    """They are not part of the codebook."""
    theirs = peers.VectorQuantize(dim=8, codebook_dim=C, codebook_size=K)
    with pytest.raises(ValueError, match=r"source must be without projections, got 'project_in\."):
        load_vector_quantize(theirs)


def test_a_source_without_settings_needs_a_quantizer() -> None:
    """Nothing is guessed."""
    state = trained(*CASES["plain"]).state_dict()
    with pytest.raises(TypeError, match=r"into must be a VectorQuantizer for a .*no settings, got None"):
        load_vector_quantize(state)


def test_a_quantizer_of_another_size_is_refused() -> None:
    """Before anything moves."""
    state = trained(*CASES["plain"]).state_dict()
    with pytest.raises(ValueError, match=exactly("into.num_codes must be 9 as the codebook, got 8.")):
        load_vector_quantize(state, into=VectorQuantizer(8, C))


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("", "prefix must be one of 'vq.', got ''."),
        ("quantizer.", "prefix must be one of 'vq.', got 'quantizer.'."),
    ],
)
def test_a_wrong_prefix_names_the_right_one(prefix: str, message: str) -> None:
    """From the names in the source."""
    theirs = nn.ModuleDict({"vq": trained(*CASES["plain"])})
    with pytest.raises(ValueError, match=exactly(message)):
        load_vector_quantize(theirs, prefix=prefix)


SEVERAL = (
    "prefix must be one of 'layers.0.', 'layers.1.', got '' (ResidualVQ); load each level and pass them all to "
)
NO_SOURCE = "source must be one that holds a VectorQuantize, with a tensor '..._codebook.embed', got "
NO_BOOK = "prefix must be that of a VectorQuantize, got"


@pytest.mark.parametrize(
    ("source", "prefix", "message"),
    [
        (lambda: peers.ResidualVQ(dim=C, codebook_size=K, num_quantizers=2), "", SEVERAL),
        (lambda: peers.ResidualVQ(dim=C, codebook_size=K, num_quantizers=2).state_dict(), "", SEVERAL),
        (
            lambda: peers.GroupedResidualVQ(dim=2 * C, groups=2, codebook_size=K, num_quantizers=1),
            "",
            "prefix must be one of 'rvqs.0.layers.0.', 'rvqs.1.layers.0.', got '' (GroupedResidualVQ); load each ",
        ),
        (
            lambda: peers.FSQ([8, 5, 5]),
            "",
            f"{NO_BOOK} '' (FSQ); it has no codebook, so build te_quant.FSQ with its levels.",
        ),
        (lambda: nn.ModuleDict({"q": peers.LFQ(codebook_size=16)}), "q.", f"{NO_BOOK} 'q.' (LFQ); it has no "),
        (lambda: nn.Linear(2, 2), "", f"{NO_SOURCE}Linear."),
        (lambda: {"a": torch.zeros(1), "b": torch.zeros(1)}, "vq.", f"{NO_SOURCE}'a', 'b'."),
        (dict, "", f"{NO_SOURCE}no tensors."),
    ],
)
def test_other_quantizers_are_named(source: Callable[[], Any], prefix: str, message: str) -> None:
    """What was found, and what to do with it; from names where there is no module."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        load_vector_quantize(source(), prefix=prefix)


class Unsafe:
    """What no weights need."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("run",))


def test_a_pickle_with_code_in_it_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is refused."""
    torch.save({"state_dict": Unsafe()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="'state_dict' must be a tensor, got _Anything"):
        load_vector_quantize(tmp_path / "model.pt", into=into())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("no-such-file.pt", FileNotFoundError, "source must be an existing file or folder or a hub id 'owner/name', got 'no-such-file.pt'."),  # noqa: E501
        (3, TypeError, "source must be a module, a state dict or the path of a file, got 3."),
        ({"step": 3}, ValueError, "source must be tensors by name, directly or under 'state_dict', got others: 'step'."),  # noqa: E501
    ],
)  # fmt: skip
def test_other_sources_are_refused(source: Any, error: type[Exception], message: str) -> None:
    """Each in one sentence."""
    with pytest.raises(error, match=exactly(message)):
        load_vector_quantize(source, into=into())


# LFQ


def test_reversed_bits_are_the_indices_of_their_lfq() -> None:
    """Their codes from their indices; unreversed, most are others."""
    theirs = peers.LFQ(dim=6, codebook_size=64).eval()
    latents = torch.randn(50, 7, 6)
    quantized, indices, _ = theirs(latents)
    ours = LFQ(6, channel_dim=-1).eval()
    assert torch.equal(ours.encode(latents), reverse_bits(indices, 6))
    assert torch.equal(ours.decode(reverse_bits(indices, 6)), quantized)
    assert (ours.encode(latents) != indices).double().mean() > 0.5


def test_reversing_twice_changes_nothing() -> None:
    """Also of long indices."""
    indices = torch.randint(1 << 62, (50,))
    assert torch.equal(reverse_bits(reverse_bits(indices, 62), 62), indices)
    assert reverse_bits(torch.tensor([1]), 62).item() == 1 << 61


def test_an_index_with_more_bits_is_refused() -> None:
    """Its highest ones would be lost."""
    with pytest.raises(ValueError, match=exactly("indices must be in [0, 2^bits=8), got 8.")):
        reverse_bits(torch.tensor([8]), 3)
