"""Quantizers made of quantizers: residual quantization over any stages, and product quantization.

Shape letters: N latent vectors, C code size, K codes, Q indices per vector.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from te_quant import (
    FSQ,
    LFQ,
    AutoencoderConfig,
    ProductQuantizer,
    Quantizer,
    ResidualVectorQuantizer,
    SimVQ,
    VectorQuantizer,
    VQAutoencoder,
)
from te_quant.quantizers._combined import CombinedQuantizer
from te_quant.testing import QUANTIZER_CHECKS
from tests.helpers import exactly, plain_residual
from tests.unit.quantizer_cases import state_of

# Quantizers of three channels, from a channel_dim.
BASES: dict[str, Callable[..., Quantizer]] = {
    "vq-gradient": partial(VectorQuantizer, 7, 3, codebook_update="gradient"),
    "vq-ema": partial(VectorQuantizer, 7, 3, codebook_update="ema", decay=0.5),
    "vq-cosine": partial(VectorQuantizer, 7, 3, codebook_update="ema", metric="cosine"),
    "fsq": partial(FSQ, (5, 3, 7)),
    "lfq": partial(LFQ, 3, temperature=0.5),
    "sim": partial(SimVQ, 7, 3),
    "bsq": partial(LFQ, 3, temperature=0.5, spherical=True),
}


def residual(*bases: Callable[..., Quantizer], **own: Any) -> Callable[..., Quantizer]:
    """A factory of a residual quantizer over one quantizer of each factory."""

    def build(channel_dim: int = 1, nonfinite: Any = None) -> Quantizer:
        stages = [base(channel_dim=channel_dim) for base in bases]
        return ResidualVectorQuantizer(stages=stages, channel_dim=channel_dim, nonfinite=nonfinite, **own)

    return build


def product(*bases: Callable[..., Quantizer], **own: Any) -> Callable[..., Quantizer]:
    """A factory of a product quantizer over one quantizer of each factory."""

    def build(channel_dim: int = 1, nonfinite: Any = None) -> Quantizer:
        groups = [base(channel_dim=channel_dim) for base in bases]
        return ProductQuantizer(groups, channel_dim=channel_dim, nonfinite=nonfinite, **own)

    return build


COMBINED = {
    **{f"residual of {name}": residual(base, base) for name, base in BASES.items()},
    **{
        f"residual of {name}, dropout": residual(base, base, quantizer_dropout=0.5) for name, base in BASES.items()
    },
    **{f"product of {name}": product(base, base) for name, base in BASES.items()},
    **{f"one {name} for two groups": product(base, num_groups=2) for name, base in BASES.items()},
    "bsq": BASES["bsq"],
}
VQ, GRID = BASES["vq-ema"], BASES["fsq"]
NESTED = {
    "residual of products": residual(product(VQ, GRID), product(GRID, VQ)),
    "product of residuals": product(residual(VQ, GRID, quantizer_dropout=True), residual(GRID, GRID, GRID)),
    "residual of residuals": residual(residual(GRID, VQ), residual(VQ, BASES["sim"]), loss_weights=(1.0, 0.5)),
    "product of products": product(product(VQ, BASES["lfq"]), product(BASES["bsq"], GRID)),
}
FAST, SLOW = ("residual of fsq",), ("product of vq-ema", "product of residuals", "residual of products", "bsq")


def _mark(name: str) -> Any:
    """One in every run, some in test-all, and the whole table in test-long."""
    return () if name in FAST else pytest.mark.slow if name in SLOW else pytest.mark.long


def _late(first: str, *others: str) -> list[Any]:
    """One in test-all, the others in test-long."""
    return [
        pytest.param(first, marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.long) for name in others),
    ]


@pytest.mark.parametrize("check", QUANTIZER_CHECKS)
@pytest.mark.parametrize("name", [pytest.param(name, marks=_mark(name)) for name in (*COMBINED, *NESTED)])
def test_keeps_its_promise(name: str, check: str) -> None:
    """The public conformance check, over each combination with each quantizer and over four nestings."""
    QUANTIZER_CHECKS[check]((COMBINED | NESTED)[name])


def built(name: str, **options: Any) -> Any:
    """A combination in float64 whose codebooks, if it has any, are as wide as the latents."""
    quantizer: Any = (COMBINED | NESTED)[name](**options).double()
    quantizer.kmeans_init(torch.randn(64, quantizer.code_dim, dtype=torch.float64), iterations=2)
    return quantizer


def parts_of(quantizer: Any) -> list[Any]:
    """The quantizers of its levels or groups."""
    return list(getattr(quantizer, "stages", None) or quantizer.quantizers)


@pytest.mark.parametrize("dropout", [False, 0.7])
@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_stages_of_codebooks_are_the_residual_quantizer_of_the_same_codebooks(update: Any, dropout: Any) -> None:
    """Given or built, the same stages give the same indices, codes, losses, gradients and next codebooks."""
    options: dict[str, Any] = {"quantizer_dropout": dropout, "nonfinite": "skip"}
    ours = ResidualVectorQuantizer(7, 3, 3, codebook_update=update, orthogonal_reg=2.0, **options).double()
    given = ResidualVectorQuantizer(stages=copy.deepcopy(list(ours.stages)), **options)
    for step in range(3):
        latents = torch.randn(20, 3, dtype=torch.float64)
        latents[4, 1] = torch.nan
        latents.requires_grad_()
        one, other = (
            quantizer(latents, generator=torch.Generator().manual_seed(step)) for quantizer in (ours, given)
        )
        assert torch.equal(one.indices, other.indices)
        for name in one._fields:
            torch.testing.assert_close(getattr(one, name), getattr(other, name))
        gradients = [torch.autograd.grad(output.loss, latents)[0] for output in (one, other)]
        torch.testing.assert_close(*gradients)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(given.state_dict()[name], value)


@pytest.mark.parametrize("size", [3, 5, 7])
def test_residual_fsq_is_one_finer_grid(size: int) -> None:
    """Two levels of L make the grid of step 2 / (L - 1)², and the nearest of its points is found."""
    quantizer = ResidualVectorQuantizer(stages=[FSQ((size,) * 2), FSQ((size,) * 2)]).double()
    latents = torch.randn(500, 2, dtype=torch.float64)
    codes = quantizer(latents).codes
    step = 2 / (size - 1) ** 2
    torch.testing.assert_close(codes, (torch.tanh(latents) / step).round() * step)


def test_residual_lfq_is_the_binary_expansion() -> None:
    """Level after level halves the step, so five of them leave at most 1/16 of what lies in [-2, 2]."""
    quantizer = ResidualVectorQuantizer(stages=[LFQ(2, entropy_weight=0.0) for _ in range(5)]).double()
    latents = torch.rand(500, 2, dtype=torch.float64) * 4 - 2
    errors = [
        (latents - quantizer.decode(quantizer.encode(latents, num_quantizers=levels))).abs().max().item()
        for levels in range(1, 6)
    ]
    assert all(error <= 2.0 ** (1 - level) for level, error in enumerate(errors, start=1))
    assert errors[-1] > 0.9 * 2**-4


@pytest.mark.parametrize("name", ["vq-cosine", "fsq", "lfq", "bsq"])
def test_a_second_level_comes_nearer(name: str) -> None:
    """The scale of fixed codes fits what the first level leaves over."""
    quantizer = built(f"residual of {name}").eval()
    latents = torch.randn(300, 3, dtype=torch.float64) * 0.7
    target = quantizer.to_code_units(quantizer.project(latents))
    indices = quantizer.encode(latents)
    errors = [(target - quantizer.decode(indices[:, :n])).square().mean().item() for n in (1, 2)]
    assert errors[1] < 0.6 * errors[0]


def test_the_levels_are_scaled_where_the_stages_are_given() -> None:
    """A quantizer of half the size codes behind an LFQ, and behind an FSQ one of half a step, for each channel."""
    quantizer = ResidualVectorQuantizer(stages=[FSQ((5, 7)), LFQ(2), VectorQuantizer(4, 2)]).double()
    indices = quantizer.encode(torch.randn(30, 2, dtype=torch.float64))
    scales = torch.tensor([[1.0, 1.0], [1 / 4, 1 / 6], [1 / 8, 1 / 12]], dtype=torch.float64)
    for stage, scale, column, codes in zip(
        quantizer.stages, scales, indices.unbind(1), quantizer.decode_levels(indices), strict=True
    ):
        torch.testing.assert_close(codes, stage.decode(column) * scale)


@pytest.mark.parametrize("name", [*NESTED, "residual of lfq, dropout", "product of sim"])
def test_terms_add_up_to_the_loss(name: str) -> None:
    """In training, of the indices that were drawn, with the gradient."""
    quantizer = built(name)
    latents = torch.randn(12, quantizer.code_dim, dtype=torch.float64, requires_grad=True)
    output = quantizer(latents)
    terms = quantizer.loss_terms(latents, output.indices)
    total = torch.stack(list(terms.values())).sum()
    torch.testing.assert_close(total, output.loss)
    wanted, got = (torch.autograd.grad(loss, latents)[0] for loss in (output.loss, total))
    torch.testing.assert_close(got, wanted)


def test_terms_are_named_by_their_place() -> None:
    """Level or group, then the term; the entropies of an LFQ are apart."""
    quantizer = product(residual(BASES["fsq"], BASES["lfq"]), BASES["vq-gradient"])()
    latents = torch.randn(5, 6)
    names = list(quantizer.loss_terms(latents, quantizer(latents).indices))
    assert names == [
        *(f"groups.0.levels.0.{term}" for term in ("codebook", "commitment", "regularization")),
        *(f"groups.0.levels.1.{term}" for term in ("codebook", "commitment", "entropy", "diversity")),
        *(f"groups.1.{term}" for term in ("codebook", "commitment", "regularization")),
    ]


@pytest.mark.parametrize("build", [residual, partial(plain_residual, 7, 3, 2)], ids=["given", "built"])
def test_loss_weights_are_factors_of_the_levels(build: Any) -> None:
    """The loss of each level, as terms without weights have it, times its weight."""
    make = build(VQ, VQ) if build is residual else build
    plain = make()
    weighted = build(VQ, VQ, loss_weights=(2.0, 0.25))() if build is residual else build(loss_weights=(2.0, 0.25))
    weighted.load_state_dict(plain.state_dict())
    latents = torch.randn(9, 3)
    output = weighted(latents)
    terms = plain.loss_terms(latents, output.indices)
    wanted = sum(term * (2.0 if name.startswith("levels.0") else 0.25) for name, term in terms.items())
    torch.testing.assert_close(output.loss, wanted)


def test_a_product_is_its_groups_side_by_side() -> None:
    """Codes, indices, state and gradients are those of each group; losses are the mean over the channels."""
    bases = [VectorQuantizer(7, 3, codebook_update="ema"), FSQ((5, 5)), LFQ(4, temperature=1.0)]
    whole, alone = ProductQuantizer(copy.deepcopy(bases)), bases
    assert whole.codebook_sizes == (7, 25, 16)
    assert (whole.num_codes, whole.code_dim, whole.num_quantizers) == (25, 9, 3)
    for _ in range(2):
        latents = torch.randn(2, 9, 3, 4, requires_grad=True)
        output = whole(latents)
        parts = [quantizer(group) for quantizer, group in zip(alone, latents.split((3, 2, 4), 1), strict=True)]
        assert torch.equal(output.codes, torch.cat([part.codes for part in parts], 1))
        assert torch.equal(output.indices, torch.stack([part.indices for part in parts], -1))
        wanted = sum(share * part.loss for share, part in zip((3 / 9, 2 / 9, 4 / 9), parts, strict=True))
        torch.testing.assert_close(output.loss, wanted)
        gradient = torch.autograd.grad(output.quantized.square().sum(), latents)[0]
        joint = sum(part.quantized.square().sum() for part in parts)
        assert torch.equal(gradient, torch.autograd.grad(joint, latents)[0])
    for inside, outside in zip(whole.quantizers, alone, strict=True):
        for name, value in outside.state_dict().items():
            assert torch.equal(inside.state_dict()[name], value)


def test_one_codebook_for_all_groups_counts_all_of_them() -> None:
    """Its statistics are those of the groups as one batch, and k-means starts it from all of them."""
    shared = ProductQuantizer([VectorQuantizer(7, 3, codebook_update="ema")], num_groups=2)
    alone = VectorQuantizer(7, 3, codebook_update="ema")
    alone.load_state_dict(shared.quantizers[0].state_dict())
    latents = torch.randn(20, 6)
    rows = torch.cat(latents.split(3, 1))
    for quantizer, values in ((shared, latents), (alone, rows)):
        quantizer.kmeans_init(values, generator=torch.Generator().manual_seed(0))
        quantizer(values)
        quantizer.apply_pending()
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(shared.quantizers[0].state_dict()[name], value)
    assert shared.revive_dead_codes(latents, threshold=1.0).shape == (2, 7)


@pytest.mark.parametrize("name", ["residual of fsq", *NESTED])
def test_the_first_indices_are_those_of_all(name: str) -> None:
    """``encode`` of fewer computes the same ones; where they end a part they decode."""
    quantizer = built(name).eval()
    latents = torch.randn(2, quantizer.code_dim, 3, 2, dtype=torch.float64)
    indices = quantizer.encode(latents)
    if not isinstance(quantizer, ResidualVectorQuantizer):
        whole = f"{quantizer.num_quantizers}, because a ProductQuantizer needs all of its indices"
        message = f"indices axis 3 must be {whole}, got 1"
        with pytest.raises(ValueError, match=f"^{message}"):
            quantizer.decode(indices[..., :1])
        return
    for count in range(1, quantizer.num_quantizers + 1):
        if name == "residual of products" and count % 2:
            whole = "one of 2, 4, because a ProductQuantizer needs all of its indices"
            message = f"num_quantizers must be {whole}, got {count}."
            with pytest.raises(ValueError, match=exactly(message)):
                quantizer.encode(latents, num_quantizers=count)
            continue
        first = quantizer.encode(latents, num_quantizers=count)
        assert torch.equal(first, indices[..., :count])
        total = sum(quantizer.decode_levels(first))
        assert torch.equal(quantizer.decode(first), total)


def test_fewer_levels_search_fewer_codebooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One search for each level asked for."""
    searched = []
    quantizer: Any = residual(*[BASES["sim"]] * 4)()
    for place, stage in enumerate(quantizer.stages):
        search = stage.search
        monkeypatch.setattr(stage, "search", lambda rows, p=place, s=search: searched.append(p) or s(rows))
    quantizer.encode(torch.randn(3, 3), num_quantizers=2)
    assert searched == [0, 1]


@pytest.mark.parametrize("given", [True, False])
def test_dropout_for_a_share_of_the_batch(given: bool) -> None:
    """A share of the elements uses a uniform number of levels, the others use all."""
    if given:
        quantizer = ResidualVectorQuantizer(stages=[FSQ((3, 3)) for _ in range(4)], quantizer_dropout=0.4)
    else:
        quantizer = plain_residual(5, 2, 4, quantizer_dropout=0.4)
    used = (quantizer(torch.randn(4000, 2, 3)).indices >= 0).sum(-1)
    assert torch.equal(used, used[:, :1].expand_as(used))
    shares = torch.bincount(used[:, 0], minlength=5)[1:] / 4000
    wanted = torch.tensor([0.1, 0.1, 0.1, 0.7])
    # Five standard deviations of a share.
    assert (shares - wanted).abs().max() < 5 * (0.7 * 0.3 / 4000) ** 0.5
    assert quantizer.eval()(torch.randn(50, 2)).indices.min() >= 0


def test_a_dropped_level_learns_nothing() -> None:
    """Its codebook gets no count where it was not used."""
    quantizer: Any = residual(VQ, VQ, quantizer_dropout=True)()
    output = quantizer(torch.randn(40, 3))
    for stage, column in zip(quantizer.stages, output.indices.unbind(1), strict=True):
        assert torch.equal(stage.pending_counts, torch.bincount(column[column >= 0], minlength=7).float())


def test_stages_follow_the_channel_axis() -> None:
    """A stage that was built for the whole, called without it, reads the same layout."""
    quantizer = plain_residual(5, 3, 2, channel_dim=-1)
    latents = torch.randn(2, 7, 3)
    assert torch.equal(quantizer.stages[0](latents).indices, quantizer(latents).indices[..., 0])


def test_each_place_refuses_the_indices_of_a_larger_codebook() -> None:
    """Two would otherwise silently read another code, or none."""
    quantizer = ResidualVectorQuantizer(stages=[VectorQuantizer(9, 2), VectorQuantizer(4, 2)])
    assert quantizer.codebook_sizes == (9, 4)
    quantizer.decode(torch.tensor([[8, 3]]))
    with pytest.raises(ValueError, match=exactly("indices[..., 1] must be in [-1, num_codes=4), got 5.")):
        quantizer.decode(torch.tensor([[5, 5]]))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: ResidualVectorQuantizer(4, stages=[FSQ((3, 3))]),
            ValueError,
            "num_codes must be left out where stages are given, which have their own, got 4.",
        ),
        (
            lambda: ResidualVectorQuantizer(stages=[FSQ((3, 3))], decay=0.5),
            ValueError,
            "decay must be left out where stages are given, which have their own, got 0.5.",
        ),
        (
            lambda: ResidualVectorQuantizer(),
            TypeError,
            "stages must be given, or num_codes, code_dim and num_quantizers, got none of them.",
        ),
        (lambda: ResidualVectorQuantizer(4, 4), TypeError, "num_quantizers must be an int >= 1, got None."),
        (
            lambda: ResidualVectorQuantizer(stages=FSQ((3, 3))),  # type: ignore[arg-type]
            TypeError,
            "stages must be a sequence of quantizers, got FSQ(levels=(3, 3)).",
        ),
        (
            lambda: ResidualVectorQuantizer(stages=[]),
            ValueError,
            "stages must be at least one quantizer, got none.",
        ),
        (
            lambda: ResidualVectorQuantizer(stages=[FSQ((3, 3)), FSQ((3, 3, 3))]),
            ValueError,
            "stages[1].code_dim must be that of stages[0], 2, got 3.",
        ),
        (
            lambda: ResidualVectorQuantizer(stages=[FSQ((3, 3), channel_dim=-1)]),
            ValueError,
            "stages[0].channel_dim must be 1 as that of the whole, got -1 (FSQ).",
        ),
        (
            lambda: ResidualVectorQuantizer(stages=[SimVQ(4, 2)], gradient_estimator="rotation_trick"),
            ValueError,
            "stages[0].gradient_estimator must be 'rotation_trick' as that of the whole, "
            "got 'straight_through' (SimVQ).",
        ),
        (
            lambda: ResidualVectorQuantizer(4, 4, 2, loss_weights=(1.0,)),
            ValueError,
            "loss_weights must be one number for each of 2 levels, got 1.",
        ),
        (
            lambda: ResidualVectorQuantizer(4, 4, 2, quantizer_dropout=1.5),
            ValueError,
            "quantizer_dropout must be a bool or a share in [0, 1], got 1.5.",
        ),
        (
            lambda: ProductQuantizer([LFQ(2)] * 2),
            ValueError,
            "quantizers[1] must be another quantizer than those before it, got one of them again; pass it once "
            "with num_groups=G to serve all groups, or pass copy.deepcopy of it.",
        ),
        (
            lambda: ResidualVectorQuantizer(stages=[FSQ((3, 3))] * 2),
            ValueError,
            "stages[1] must be another quantizer than those before it, got one of them again; pass sizes with "
            "shared_codebook=True to share a codebook, or pass copy.deepcopy of it.",
        ),
        (
            lambda: ProductQuantizer([LFQ(2), LFQ(3)], num_groups=2),
            ValueError,
            "num_groups must be None where several quantizers are given, got 2.",
        ),
        (
            lambda: ProductQuantizer([4]),  # type: ignore[list-item]
            TypeError,
            "quantizers[0] must be a te_quant.Quantizer, got 4.",
        ),
    ],
)
def test_refuses_what_does_not_fit(build: Callable[[], object], error: type[Exception], message: str) -> None:
    """One sentence that names the option, what is wanted and what came."""
    with pytest.raises(error, match=exactly(message)):
        build()


@pytest.mark.parametrize(
    "name", ["residual of residuals", pytest.param("product of products", marks=pytest.mark.slow)]
)
def test_an_autoencoder_saves_its_parts(name: str, tmp_path: Any) -> None:
    """By name, with options, whatever they are made of; without an instance it loads the same bits in float64."""
    pytest.importorskip("safetensors")
    config = AutoencoderConfig(base_channels=2, channel_multipliers=(1, 1), attention_levels=(), norm_groups=1)
    model = VQAutoencoder(config, quantizer=(COMBINED | NESTED)[name]()).double().eval()
    model.save_pretrained(tmp_path)
    again = VQAutoencoder.from_pretrained(tmp_path)
    assert repr(again.quantizer) == repr(model.quantizer)
    assert AutoencoderConfig.from_dict(again.config.to_dict()) == again.config
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    assert torch.equal(again(images).reconstruction, model(images).reconstruction)


def test_a_config_describes_stages_by_name() -> None:
    """Nested as the quantizers are; sizes of the fields are for a quantizer without stages."""
    stages = [{"name": "FSQ", "levels": [5, 5]}, {"name": "VectorQuantizer", "num_codes": 6, "code_dim": 2}]
    config = AutoencoderConfig(quantizer={"name": "ResidualVectorQuantizer", "stages": stages})
    assert (config.num_codes, config.code_dim) == (25, 2)
    assert config.quantizer == {"name": "ResidualVectorQuantizer", "stages": stages}
    assert [type(stage).__name__ for stage in parts_of(config.build_quantizer())] == ["FSQ", "VectorQuantizer"]
    with pytest.raises(ValueError, match=r"^quantizer name must be one of .*, got 'Other'"):
        AutoencoderConfig(quantizer={"name": "ProductQuantizer", "quantizers": [{"name": "Other"}]})


WHOLES: dict[str, Callable[[], Any]] = {
    "built": lambda: ResidualVectorQuantizer(7, 3, 2),
    "stages": lambda: ResidualVectorQuantizer(stages=[VectorQuantizer(7, 3), VectorQuantizer(7, 3)]),
    "product": lambda: ProductQuantizer([VectorQuantizer(7, 1), VectorQuantizer(7, 2)]),
    "nested": lambda: ProductQuantizer([ResidualVectorQuantizer(7, 1, 2), VectorQuantizer(7, 2)]),
    "sim": lambda: ProductQuantizer([SimVQ(7, 1), VectorQuantizer(7, 2)]),
}


@pytest.mark.parametrize("name", WHOLES)
def test_a_part_in_evaluation_stays_while_the_others_move(name: str) -> None:
    """As a loop over ``modules()`` leaves it; back in training (the control) it moves again."""
    quantizer = WHOLES[name]()
    quantizer(torch.randn(40, 3))
    still, moving = [part for part in quantizer.modules() if isinstance(part, VectorQuantizer | SimVQ)][:2]
    still.eval()
    before = state_of(still), state_of(moving)
    for _ in range(2):
        quantizer(torch.randn(40, 3))
    assert all(torch.equal(value, before[0][key]) for key, value in state_of(still).items())
    assert not torch.equal(state_of(moving)["usage"], before[1]["usage"])
    quantizer.train()
    for _ in range(2):
        quantizer(torch.randn(40, 3))
    assert not torch.equal(still.usage, before[0]["usage"])


@pytest.mark.parametrize("name", WHOLES)
def test_a_part_that_accumulates_stands_still_inside_a_whole(name: str) -> None:
    """Until its block ends; then it moves by everything that the block recorded."""
    quantizer = WHOLES[name]()
    quantizer(torch.randn(40, 3))
    still, moving = [part for part in quantizer.modules() if isinstance(part, VectorQuantizer | SimVQ)][:2]
    with still.accumulate():
        before = state_of(still), state_of(moving)
        for _ in range(3):
            quantizer(torch.randn(40, 3))
        assert torch.equal(still.usage, before[0]["usage"])
        assert not torch.equal(moving.usage, before[1]["usage"])
        assert int(still.pending_counts.sum()) == 3 * 40
    quantizer(torch.randn(40, 3))
    assert int(still.pending_counts.sum()) == 40
    assert not torch.equal(still.usage, before[0]["usage"])


def test_a_frozen_part_stays_while_the_others_move() -> None:
    """It is neither moved nor counted; a restart is refused before any other part has moved."""
    quantizer: Any = NESTED["product of products"]()
    frozen = quantizer.quantizers[0].quantizers[0].freeze()
    before = state_of(quantizer)
    message = "kmeans_init must be called on a quantizer that is not frozen, got a frozen one."
    with pytest.raises(RuntimeError, match=exactly(message)):
        quantizer.kmeans_init(torch.randn(20, quantizer.code_dim))
    quantizer(torch.randn(20, quantizer.code_dim))
    quantizer.apply_pending()
    assert not frozen.pending_counts.any()
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


@pytest.mark.parametrize("name", _late("residual of fsq, dropout", "residual of sim", *NESTED))
def test_compiles_in_one_graph(name: str) -> None:
    """Traced in full, in training, for all batch sizes at once; where nothing is drawn the step equals eager."""
    torch._dynamo.reset()
    eager: Any = (COMBINED | NESTED)[name]()
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (7, 5):
        latents = torch.randn(batch, eager.code_dim, 4, 5)
        output = compiled(latents)
        assert torch.equal(twin.decode(output.indices), output.codes)
        if "dropout" not in name and name != "product of residuals":
            for a, b in zip(output, eager(latents), strict=True):
                torch.testing.assert_close(a, b)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", _late("product of vq-ema", "residual of fsq", "residual of bsq", *NESTED))
def test_exports(name: str) -> None:
    """The exported graph gives the bits of the module, for another batch size too."""
    quantizer: Any = (COMBINED | NESTED)[name]().eval()
    program = torch.export.export(
        quantizer,
        (torch.randn(3, quantizer.code_dim, 4, 5),),
        dynamic_shapes=({0: torch.export.Dim("batch", min=2)},),
    )
    latents = torch.randn(6, quantizer.code_dim, 4, 5)
    for got, wanted in zip(program.module()(latents), quantizer(latents), strict=True):
        torch.testing.assert_close(got, wanted)


def peer_levels(quantizer: Any, indices: Tensor) -> Tensor:
    """The codes of each level, (Q, ..., C), with channels last."""
    return torch.stack(quantizer.decode_levels(indices))


@pytest.mark.slow
def test_residual_fsq_beside_vector_quantize_pytorch() -> None:
    """Given the range and the scale of our first level, their levels choose the same points.

    Theirs bounds latents to 1 + 1 / (L - 1), so that the outermost cells are whole, and divides by L from level to
    level. Ours keeps the range of FSQ, [-1, 1], which the scale of 1 / (L - 1) fits.
    """
    peers = pytest.importorskip("vector_quantize_pytorch")
    levels = [5, 7, 3]
    theirs = peers.ResidualFSQ(levels=levels, num_quantizers=3).eval()
    theirs.soft_clamp_input_value = torch.ones(3)
    theirs.scales = torch.stack([(torch.tensor(levels) - 1.0) ** -level for level in range(3)])
    ours = ResidualVectorQuantizer(stages=[FSQ(levels) for _ in range(3)], channel_dim=1)
    latents = torch.randn(200, 3)
    output = ours(latents)
    quantized, indices, codes = theirs(latents[None], return_all_codes=True)
    torch.testing.assert_close(output.codes, quantized[0])
    assert torch.equal(output.indices, indices[0].long())
    torch.testing.assert_close(peer_levels(ours, output.indices), codes[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize("spherical", [False, True])
def test_residual_lfq_beside_vector_quantize_pytorch(spherical: bool) -> None:
    """The same codes at each level, which halve from one to the next."""
    peers = pytest.importorskip("vector_quantize_pytorch")
    theirs = peers.ResidualLFQ(dim=4, codebook_size=16, num_quantizers=3, spherical=spherical).eval()
    stages = [LFQ(4, spherical=spherical) for _ in range(3)]
    ours = ResidualVectorQuantizer(stages=stages)
    latents = torch.randn(200, 4)
    # Theirs subtracts codes on the sphere from the latents themselves, ours from latents on the sphere.
    given = torch.nn.functional.normalize(latents, dim=1) if spherical else latents
    quantized, *_ = theirs(given[None])
    torch.testing.assert_close(ours(latents).codes, quantized[0])


@pytest.mark.slow
def test_grouped_residual_quantization_beside_vector_quantize_pytorch() -> None:
    """A product of residual quantizers is their GroupedResidualVQ, whose axis of groups comes first."""
    peers = pytest.importorskip("vector_quantize_pytorch")
    theirs = peers.GroupedResidualVQ(
        dim=6, groups=2, num_quantizers=3, codebook_size=8, rotation_trick=False, kmeans_init=False
    ).eval()
    residuals = [ResidualVectorQuantizer(8, 3, 3, channel_dim=-1) for _ in range(2)]
    ours = ProductQuantizer(residuals, channel_dim=-1).eval()
    with torch.no_grad():
        for group, own in zip(theirs.rvqs, residuals, strict=True):
            for layer, stage in zip(group.layers, own.stages, strict=True):
                stage.codebook.copy_(torch.randn(8, 3))
                layer._codebook.embed.copy_(stage.codebook[None])
    latents = torch.randn(2, 40, 6)
    quantized, indices, _ = theirs(latents)
    output = ours(latents)
    torch.testing.assert_close(output.codes, quantized)
    assert torch.equal(output.indices, torch.cat(list(indices), dim=-1))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda bare: bare._parts(), "Bare must define _parts()."),
        (lambda bare: bare._lengths(), "Bare must define _lengths()."),
        (lambda bare: bare.kmeans_init(torch.zeros(3, 2)), "Bare must define _visit(rows, lifecycle)."),
    ],
)
def test_a_subclass_says_which_step_it_lacks(step: Callable[[Any], object], message: str) -> None:
    """As :class:`te_quant.Quantizer` does."""

    class Bare(CombinedQuantizer):
        reference = dtype = None

    with pytest.raises(NotImplementedError, match=exactly(message)):
        step(Bare([FSQ((3, 3))], 2))
