"""The numerical floor: the same images, other arithmetic."""

import math

import pytest
import torch
from torch import nn

from te_quant import VectorQuantizer
from te_quant.equivariance import measure_equivariance, numerical_floor, placement_agreement
from te_quant.stability import Identity, measure_stability


def levels(images: torch.Tensor) -> torch.Tensor:
    """One of eight levels for each cell."""
    return ((images[:, 0, ::2, ::2].float() + 1) * 3.99).long()


def depends_on_batch(images: torch.Tensor) -> torch.Tensor:
    """As batch statistics at test time would: another answer when alone."""
    return levels(images) ^ (len(images) == 1)


def test_floor_counts_what_rounding_changes():
    """bfloat16 against an oracle that rounds value by value; batches of one change nothing."""
    images = torch.rand(9, 1, 16, 16) * 2 - 1
    floor = numerical_floor(
        levels,
        images,
        num_codes=8,
        variants={"batch of one": 1, "bfloat16": lambda x: levels(x.bfloat16())},
        batch_size=4,
    )
    assert list(floor) == ["batch of one", "bfloat16"]
    assert floor["batch of one"].rate == 1.0
    assert floor["batch of one"].differing == 0
    values = images[:, 0, ::2, ::2].flatten().tolist()
    rounded = images[:, 0, ::2, ::2].flatten().bfloat16().tolist()
    expected = sum(
        math.floor((a + 1) * 3.99) != math.floor((b + 1) * 3.99) for a, b in zip(values, rounded, strict=True)
    )
    assert floor["bfloat16"].tokens == 9 * 64
    assert abs(floor["bfloat16"].differing - expected) <= 2
    assert floor["bfloat16"].kappa == pytest.approx(1 - expected / (9 * 64) / (7 / 8), abs=0.02)


def test_a_tokenizer_that_looks_at_its_batch_is_found_out():
    """Negative control: by default one image at a time against batches."""
    images = torch.rand(6, 1, 8, 8) * 2 - 1
    floor = numerical_floor(depends_on_batch, images, num_codes=8, batch_size=3)
    assert floor["batch of one"].rate == 0
    assert floor["batch of one"].differing == floor["batch of one"].tokens == 6 * 16
    # The last batch is a batch of one itself, and agrees.
    uneven = numerical_floor(depends_on_batch, images, num_codes=8, batch_size=5)
    assert uneven["batch of one"].rate == pytest.approx(1 / 6)
    low, high = uneven["batch of one"].rate_interval
    assert low < 1 / 6 < high
    without = numerical_floor(depends_on_batch, images, num_codes=8, batch_size=5, resamples=0)
    assert math.isnan(without["batch of one"].rate_interval[0])


def test_report_carries_the_floor_of_its_unshifted_images():
    """By default batches of one; {} measures none."""
    images = torch.rand(5, 1, 8, 8) * 2 - 1
    options = {"stride": 2, "num_codes": 8, "protocol": "circular", "batch_size": 2}
    report = measure_equivariance(depends_on_batch, images, **options)
    alone = numerical_floor(depends_on_batch, images, num_codes=8, batch_size=2)
    assert report.numerical_floor == alone
    assert f"| batch of one | {alone['batch of one'].differing} | 80 |" in report.to_markdown()
    none = measure_equivariance(levels, images, variants={}, **options)
    assert none.numerical_floor == {}
    assert "numerical floor" not in none.to_markdown()


def test_batches_of_one_are_no_variant_of_themselves():
    """Nothing was compared then, which a rate of 1 would hide."""
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    assert numerical_floor(depends_on_batch, images, num_codes=8, batch_size=1) == {}
    floor = numerical_floor(depends_on_batch, images, num_codes=8, batch_size=2)
    assert floor["batch of one"].differing == 2 * 16
    report = measure_equivariance(levels, images, stride=2, num_codes=8, protocol="circular", batch_size=1)
    assert report.numerical_floor == {}


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"images": torch.zeros(1, 8, 8)}, ValueError, r"images must be of shape \(B, C, H, W\)"),
        ({"images": torch.zeros(1, 1, 8, 8).long()}, TypeError, "images must be floating point"),
        ({"images": torch.zeros(0, 1, 8, 8)}, ValueError, "images must be at least one"),
        ({"num_codes": 0}, ValueError, "num_codes must be an int >= 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be an int >= 1"),
        ({"resamples": -1}, ValueError, "resamples must be an int >= 0"),
        ({"variants": {"one": 0}}, ValueError, r"variants\['one'\] must be an int >= 1, got 0"),
        ({"variants": {"one": True}}, TypeError, r"variants\['one'\] must be an int >= 1, got True"),
        # No batch is larger than those in which `tokenize` is called anyway.
        (
            {"variants": {"128": 128}},
            ValueError,
            r"variants\['128'\] must be below batch_size=64, got 128; pass a smaller number",
        ),
        ({"variants": {"4": 4}, "batch_size": 4}, ValueError, r"variants\['4'\] must be below batch_size=4"),
        (
            {"tokenize": lambda x: levels(x).flatten(1)},
            ValueError,
            r"tokenize\(images\) must be of shape \(N, h, w\)",
        ),
        (
            {"tokenize": lambda x: levels(x) + 8},
            ValueError,
            r"tokenize\(images\) must be indices in \[0, num_codes=8\)",
        ),
        ({"tokenize": lambda x: levels(x).float()}, TypeError, r"tokenize\(images\) must be an integer tensor"),
        (
            {"variants": {"half": lambda x: levels(x)[:, :1]}},
            ValueError,
            r"variants\['half'\]\(images\) must be of shape \(2, 4, 4\), got shape \(2, 1, 4\)",
        ),
    ],
)
def test_wrong_arguments_are_refused(change, error, match):
    """One clear error for each."""
    options = {"tokenize": levels, "images": torch.zeros(2, 1, 8, 8), "num_codes": 8} | change
    with pytest.raises(error, match=match):
        numerical_floor(options.pop("tokenize"), options.pop("images"), **options)


def dropping():
    """A tokenizer with dropout, whose codebook stays."""
    encoder = nn.Sequential(nn.Conv2d(1, 4, 4, stride=4), nn.Dropout(0.5))
    return nn.Sequential(encoder, VectorQuantizer(16, 4, codebook_update="gradient"))


def learning():
    """A tokenizer whose codebook moves in training mode."""
    return nn.Sequential(nn.Conv2d(1, 4, 4, stride=4), VectorQuantizer(16, 4))


def render(indices):
    """Any picture of 4 pixels per token."""
    return (indices / 8 - 1)[:, None].repeat_interleave(4, -1).repeat_interleave(4, -2)


def torch_metric(tokenize, images):
    """Of torchmetrics, whose forward resets its counts for each batch."""
    pytest.importorskip("torchmetrics")
    from te_quant.integrations.torchmetrics import TokenMatch

    metric = TokenMatch(16)
    for batch in torch.split(images, 2):
        metric(tokenize, render, batch)


# What measures, how many calls it makes besides the check, and what its error calls the tokenizer.
MEASURES = {
    # Two batches of one reference, one whole shift and one shift below a token.
    "circular": (
        lambda tokenize, images: measure_equivariance(
            tokenize,
            images,
            protocol="circular",
            stride=4,
            num_codes=16,
            variants={},
            shifts=[(4, 0)],
            sub_stride_shifts=[(1, 0)],
            batch_size=2,
            resamples=0,
        ),
        6,
        "tokenize",
    ),
    "placement": (
        lambda tokenize, images: placement_agreement(
            tokenize, images, canvas_size=32, stride=4, num_codes=16, batch_size=2, resamples=0
        ),
        10,
        "tokenize",
    ),
    "floor": (
        lambda tokenize, images: numerical_floor(
            tokenize, images, num_codes=16, variants={"again": tokenize}, batch_size=2, resamples=0
        ),
        4,
        "tokenize",
    ),
    "stability": (
        lambda tokenize, images: measure_stability(
            tokenize, render, images, transforms=[Identity()], num_codes=16, batch_size=2, resamples=0
        ),
        4,
        "encode",
    ),
    "torchmetrics": (torch_metric, 4, "encode"),
}


@pytest.mark.filterwarnings("ignore:no sprite contains the ground")
@pytest.mark.parametrize("network", [dropping, learning])
@pytest.mark.parametrize("name", MEASURES)
def test_a_tokenizer_in_training_mode_is_refused(name, network):
    """Figures would mix its randomness with the shifts. In evaluation mode the check costs one call of a batch."""
    measure, calls, argument = MEASURES[name]
    model, images, sizes = network(), torch.rand(4, 1, 16, 16) * 2 - 1, []

    def tokenize(x):
        sizes.append(len(x))
        return model[1](model[0](x)).indices

    match = (
        rf"^{argument} must be a function that leaves its model as it is, got one that changes '1\.\w+'; call mo"
    )
    with pytest.raises(ValueError, match=match):
        measure(tokenize, images)
    assert len(sizes) <= 3
    model.eval()
    sizes.clear()
    measure(tokenize, images)
    assert sizes == [2] * (calls + 1)


@pytest.mark.parametrize(("share", "refused"), [(0.005, False), (0.02, True)])
def test_rounding_of_a_device_is_no_randomness(share, refused):
    """Kernels that sum in any order change a few near-ties; one token in a hundred may differ."""
    images = torch.rand(1, 1, 64, 64) * 2 - 1
    calls = []

    def tokenize(x):
        calls.append(len(x))
        indices = levels(x)
        indices.flatten()[: int(share * indices.numel()) if len(calls) == 2 else 0] ^= 1
        return indices

    if refused:
        with pytest.raises(ValueError, match="got other indices for 20 of 1,024 tokens"):
            numerical_floor(tokenize, images, num_codes=8)
    else:
        assert numerical_floor(tokenize, images, num_codes=8)["batch of one"].rate == 1
