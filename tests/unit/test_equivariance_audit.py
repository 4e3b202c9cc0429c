"""The audit names the module that loses equivariance, by the parts that its documentation defines."""

import json
import math
import re
import warnings
from dataclasses import FrozenInstanceError, replace
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from te_quant import (
    AutoencoderConfig,
    ProductQuantizer,
    ResidualVectorQuantizer,
    VectorQuantizer,
    VQAutoencoder,
    build_encoder,
)
from te_quant.equivariance.audits._trials import UnitSums
from te_quant.equivariance.audits.auditor import audit
from te_quant.equivariance.audits.constant_image import constant_image_probe
from te_quant.equivariance.audits.report import AuditReport
from te_quant.equivariance.audits.rows import SkippedModule, decibels
from te_quant.layers import MaxPool, SelfAttention2d
from tests.unit.grid_oracles import convolve, fresh, normalize


def conv(cin, cout, kernel=3, stride=1, mode="circular"):
    """A padded convolution in float64."""
    return nn.Conv2d(cin, cout, kernel, stride, kernel // 2, padding_mode=mode).double()


def encoder(padding, **options):
    """The small brother of the paper's encoder."""
    config = AutoencoderConfig(
        image_channels=1,
        base_channels=8,
        norm_groups=4,
        code_dim=8,
        encoder_padding=padding,
        decoder_padding=padding,
        num_codes=8,
        **options,
    )
    return build_encoder(config).double()


class Polyphase(nn.Module):
    """Keep the component with the largest norm, image by image."""

    def forward(self, images):
        """The kept component, and which."""
        parts = torch.stack([images[..., p::2, q::2] for p in (0, 1) for q in (0, 1)], 1)
        best = parts.square().sum((2, 3, 4)).argmax(1)
        return parts[torch.arange(len(images)), best], best


class First(nn.Module):
    """The first entry of a tuple."""

    def forward(self, pair):
        """Drop the rest."""
        return pair[0]


class Positions(nn.Module):
    """A child that is exact, and absolute positions that the container adds itself."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.inner, self.weight = conv(2, 2), weight

    def forward(self, images):
        """Add a wave that does not move."""
        return self.inner(images) + self.weight * torch.arange(images.shape[-1]).sin()


def row(report, name):
    """The row of one module."""
    (found,) = [r for r in report.rows if r.name == name]
    return found


def interior_by_loops(side, shift, share):
    """Positions at least side // share from both ends, before and after the shift."""
    margin, kept = side // share, []
    for u in range(side):
        before = (u - shift) % side
        kept.append(margin <= u < side - margin and margin <= before < side - margin)
    return np.array(kept)


def fourier_by_matrix(signal, amount, axis):
    """Shift one axis by trigonometric interpolation, an even side's Nyquist frequency left out."""
    side = signal.shape[axis]
    u = np.arange(side)
    kernel = np.zeros((side, side))
    for k in range(-(side - 1) // 2 if side % 2 else -side // 2 + 1, (side + 1) // 2):
        kernel += np.cos(2 * np.pi * k * (u[:, None] - u[None, :] - amount) / side) / side
    return np.moveaxis(np.tensordot(kernel, signal, (1, axis)), 0, axis)


def relative(error, reference):
    """Squared error over the variance by channel."""
    return error / ((reference - reference.mean((0, 2, 3), keepdims=True)) ** 2).sum()


def mean_inside(errors, rows, columns):
    """The mean over the interior, times the number of positions."""
    summed = errors.sum((0, 1))
    return summed[np.ix_(rows, columns)].mean() * summed.size


def test_border_and_global_follow_their_definitions():
    """A zero-padded convolution and a GroupNorm behind it, against NumPy, with loops and masks of its own."""
    first, norm = conv(1, 4, mode="zeros"), nn.GroupNorm(2, 4, eps=1e-6).double()
    images = fresh(3, 1, 16, 24)
    report = audit(nn.Sequential(first, norm), images, shifts=[(2, -3)], sub_stride_shifts=())
    weight, bias, margins = first.weight, first.bias, (1, 1, 1, 1)

    def moved(z):
        return np.roll(z, (2, -3), (2, 3))

    x = images.numpy()
    b = convolve(x, weight, bias, margins, "zeros")
    actual = convolve(moved(x), weight, bias, margins, "zeros")
    errors = (actual - moved(b)) ** 2
    rows, columns = interior_by_loops(16, 2, 4), interior_by_loops(24, -3, 4)
    inside = mean_inside(errors, rows, columns)
    assert inside < 1e-20
    entry = row(report, "0")
    assert entry.whole_error == pytest.approx(relative(errors.sum(), b))
    assert entry.border_error == pytest.approx(relative(errors.sum() - inside, b))
    assert entry.part("global") == 0

    z = normalize(b, 2)
    zone = ~(interior_by_loops(16, 2, 8)[:, None] & interior_by_loops(24, -3, 8)[None, :])
    partly = np.where(zone, actual, moved(b))
    errors = (normalize(partly, 2) - moved(z)) ** 2
    entry = row(report, "1")
    assert entry.global_error == pytest.approx(relative(mean_inside(errors, rows, columns), z), rel=1e-6)
    assert entry.part("border") == 0
    assert entry.part("global") > 0
    assert entry.whole_error == pytest.approx(
        relative(((normalize(actual, 2) - moved(z)) ** 2).sum(), z), rel=1e-6
    )


def test_what_is_lost_everywhere_is_not_counted_as_border():
    """A leaf that adds noise to fixed places: its density inside makes the global part, the excess the border."""
    noise = fresh(1, 1, 16, 16) * torch.where(torch.arange(16) < 1, 9.0, 1.0)

    class Noisy(nn.Module):
        """Adds the noise."""

        def forward(self, images):
            """Add it."""
            return images + noise

    images = fresh(2, 1, 16, 16)
    entry = audit(nn.Sequential(Noisy()), images, shifts=[(0, 2)]).rows[0]
    b, n = (images + noise).numpy(), noise.numpy()
    errors = np.repeat((n - np.roll(n, 2, 3)) ** 2, 2, axis=0)
    inside = mean_inside(errors, interior_by_loops(16, 0, 4), interior_by_loops(16, 2, 4))
    assert entry.global_error == pytest.approx(relative(inside, b))
    assert entry.border_error == pytest.approx(relative(errors.sum() - inside, b))
    assert entry.whole_error == pytest.approx(entry.global_error + entry.border_error)


def test_aliasing_follows_its_definition():
    """A strided convolution against trigonometric sums and the whole shifts beside them, image by image."""
    module = conv(1, 2, stride=2)
    images = fresh(3, 1, 16, 32)
    report = audit(nn.Sequential(module), images)
    b = convolve(images.numpy(), module.weight, module.bias, (1, 1, 1, 1), "circular", 2)
    inside, everywhere = [], []
    for step in ((1, 0), (0, 1)):
        axis = 2 if step[0] else 3
        x = np.roll(images.numpy(), step, (2, 3))
        y = convolve(x, module.weight, module.bias, (1, 1, 1, 1), "circular", 2)
        smooth = fourier_by_matrix(y, 0, axis)
        laws = [y - b, y - np.roll(b, 1, axis), smooth - fourier_by_matrix(b, 0.5, axis)]
        errors = np.stack(laws) ** 2
        rows, columns = (interior_by_loops(n, math.ceil(k / 2), 4) for n, k in zip(b.shape[2:], step, strict=True))
        mask = rows[:, None] & columns[None, :]
        total = 0.0
        for image in range(3):
            best = errors[:, image][..., mask].sum((1, 2)).argmin()
            total += errors[best, image][..., mask].sum()
        inside.append(total / mask.sum() * mask.size)
        everywhere.append(sum(errors[:, image].sum((1, 2, 3)).min() for image in range(3)))
    entry = row(report, "0")
    assert entry.aliasing_error == pytest.approx(relative(np.mean(inside), b))
    assert entry.sub_stride_error == pytest.approx(relative(np.mean(everywhere), b))
    assert entry.part("border") == entry.part("global") == 0


def test_zero_padded_encoder_has_the_padding_and_the_strided_convolution_as_culprits():
    """What the paper's baseline loses, and where; the statistics only spread it."""
    report = audit(encoder("zeros"), fresh(2, 1, 32, 32))
    border, spread, aliasing = (report.worst(part) for part in ("border", "global", "aliasing"))
    assert border.kind == "PaddedConv2d"
    assert border.padding == "pads (zeros)"
    assert spread.kind in ("GroupNorm", "SelfAttention2d")
    assert aliasing.name.endswith("downsample.conv")
    assert report.stride == 4
    for entry in report.rows:
        assert (entry.part("border") > 0) == bool(entry.padding), entry.name
        assert (entry.aliasing_error is not None) == entry.name.endswith("downsample.conv")
    assert row(report, "levels.0.block0.norm1").part("global") > 0
    assert row(report, "middle.attention").part("global") > 0


def test_circular_encoder_keeps_its_aliasing_alone():
    """The control: the same encoder without a border loses nothing under whole strides."""
    report = audit(encoder("circular"), fresh(2, 1, 32, 32))
    assert report.worst("border") is None
    assert report.worst("global") is None
    assert report.worst("aliasing").name.endswith("downsample.conv")
    assert all(r.whole_error < 1e-20 for r in report.rows)
    assert row(report, "to_latents").sub_stride_error > 1e-3


def test_adaptive_polyphase_loses_nothing_at_one_pixel():
    """Two levels of it, behind circular convolutions: every part and the error at the end are rounding."""
    model = nn.Sequential(conv(1, 3), nn.SiLU(), Polyphase(), First(), conv(3, 3), Polyphase())
    report = audit(model, fresh(3, 1, 32, 48), sub_stride_shifts=[(1, 0), (0, 3), (2, -1)])
    assert report.stride == 4
    assert report.culprits() == {"border": None, "global": None, "aliasing": None}
    assert all(r.whole_error < 1e-20 and r.sub_stride_error < 1e-20 for r in report.rows)
    worse = audit(nn.Sequential(*model[:4], MaxPool().double()), fresh(3, 1, 32, 48))
    assert worse.worst("aliasing").kind == "MaxPool"


def test_integer_encoder_of_the_library_keeps_everything():
    """The configuration that is exact for integer shifts: no culprit, nothing lost at one pixel, phases too."""
    report = audit(encoder("circular", downsample="polyphase", upsample="polyphase"), fresh(2, 1, 32, 32))
    assert report.culprits() == {"border": None, "global": None, "aliasing": None}
    assert row(report, "to_latents").sub_stride_error < 1e-20
    assert any("olyphase" in r.kind for r in report.rows)


def test_resnet_stem():
    """A ResNet's stem in plain torch: its convolution and pool pad and stride; BatchNorm and ReLU are exact."""
    stem = nn.Sequential(
        nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
    )
    report = audit(stem, fresh(2, 3, 64, 64, dtype=torch.float32))
    assert report.worst("border").padding.startswith("pads")
    assert report.worst("border").kind in ("Conv2d", "MaxPool2d")
    assert report.worst("global") is None
    assert report.worst("aliasing").kind in ("Conv2d", "MaxPool2d")
    assert [r.stride for r in report.rows] == [2, 2, 2, 4]
    for name in "12":
        assert row(report, name).part("border") == row(report, name).part("global") == 0
    # In place or not: what is compared is what the module was given.
    stem[2] = nn.ReLU()
    assert audit(stem, fresh(2, 3, 64, 64, dtype=torch.float32)).rows[2].part("border") == 0


def test_diffusers_vq_model():
    """A third party's VQGAN, untouched: its downsampling pads outside of the convolution and is named."""
    with warnings.catch_warnings():
        # Deprecation notes of its own imports; nothing of ours runs in here.
        warnings.simplefilter("ignore")
        diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
        model = diffusers.VQModel(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=3,
            num_vq_embeddings=16,
            norm_num_groups=4,
        )
    report = audit(model, fresh(2, 3, 32, 32, dtype=torch.float32))
    culprits = report.culprits()
    assert culprits["border"].padding == "pads (zeros)"
    assert culprits["global"].kind in ("GroupNorm", "Attention")
    assert culprits["aliasing"].name == "encoder.down_blocks.0.downsamplers.0"
    assert culprits["aliasing"].unaudited == ("encoder.down_blocks.0.downsamplers.0.conv",)
    assert row(report, "encoder.mid_block.attentions.0").kind == "Attention"
    assert row(report, "quantize").part("border") == 0


def test_autoencoder_through_its_quantizer():
    """Our own model from images to images; the quantizer is pointwise, the decoder has strides again."""
    model = VQAutoencoder(
        AutoencoderConfig(
            image_channels=1,
            base_channels=8,
            norm_groups=4,
            code_dim=8,
            num_codes=8,
            channel_multipliers=(1, 1),
            attention_levels=(),
        )
    ).double()
    report = audit(model, fresh(2, 1, 32, 32))
    quantizer = row(report, "quantizer")
    assert quantizer.part("border") == quantizer.part("global") == 0
    assert report.worst("border").padding.startswith("pads")
    assert report.rows[-1].name == "decoder.conv_out"
    assert report.rows[-1].stride == 1
    part = audit(model, fresh(2, 1, 32, 32), run=model.encode)
    assert part.rows[-1].name == "encoder.to_latents"


def test_absolute_positions_are_found_where_they_are_added():
    """By a container between exact children it is the container that is named; without them it has no row."""
    images = fresh(2, 2, 16, 16)
    report = audit(nn.Sequential(conv(2, 2), Positions()), images)
    assert report.worst("global").name == "1"
    assert report.worst("global").kind == "Positions"
    assert report.worst("border") is None or report.worst("border").name == "1"
    harmless = audit(nn.Sequential(conv(2, 2), Positions(0.0)), images)
    assert [r.name for r in harmless.rows] == ["0", "1.inner"]


def test_attention_spreads_what_the_padding_lost():
    """A border error in, an error everywhere out; nothing if there was none; ``whole`` hides the inside."""
    images = fresh(2, 2, 16, 16)
    attention = SelfAttention2d(4, norm_groups=2).double()
    report = audit(nn.Sequential(conv(2, 4, mode="zeros"), attention), images)
    assert [r.name for r in report.rows] == ["0", "1"]
    assert report.worst("global").name == "1"
    assert audit(nn.Sequential(conv(2, 4), attention), images).worst("global") is None
    pair = nn.Sequential(conv(2, 2, mode="zeros"), nn.SiLU())
    assert [r.name for r in audit(nn.Sequential(pair, conv(2, 2)), images, whole=["0"]).rows] == ["0", "1"]
    assert [r.name for r in audit(nn.Sequential(pair, conv(2, 2)), images).rows] == ["0.0", "0.1", "1"]


def test_padding_outside_of_a_convolution_is_the_containers():
    """What no child can show alone is shown by the smallest module around it."""
    outside = nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(2, 2, 3).double())
    report = audit(nn.Sequential(conv(2, 2), outside), fresh(2, 2, 16, 16))
    assert report.worst("border").name == "1"
    assert report.worst("border").unaudited == ("1.0", "1.1")
    assert {s.name for s in report.skipped} == {"1.0", "1.1"}
    assert {s.reason for s in report.skipped} == {
        "its output of 18x18 is no grid over images of 16x16",
        "its input of 18x18 is no grid over images of 16x16",
    }


def striding(mode="zeros", wrong=2):
    """A circular stem, a strided convolution that pads with ``mode``, and one more layer."""
    return nn.Sequential(conv(1, 2), conv(2, 2, stride=wrong, mode=mode), nn.SiLU(), conv(2, 2))


def test_strided_layer_is_named_where_the_sides_fit():
    """The padding and the aliasing are those of the one layer that has both."""
    report = audit(striding(), fresh(2, 1, 64, 64))
    assert report.worst("border").name == report.worst("aliasing").name == "1"
    assert report.missed() == ()


@pytest.mark.parametrize(
    ("model", "sides", "match"),
    [
        pytest.param(
            striding(),
            (65, 64),
            r"images sides must be multiples of the stride 2 of module '1' \(Conv2d\), which gives 33x32, "
            r"got \(65, 64\); crop them to 64x64",
            id="one level",
        ),
        pytest.param(
            nn.Sequential(conv(1, 2, stride=2), striding()[1:]),
            (66, 64),
            r"multiples of the stride 4 of module '1.1' .* gives 17x16, got \(66, 64\); crop them to 64x64",
            id="two levels",
        ),
        pytest.param(
            nn.Sequential(nn.AvgPool2d(2), nn.Upsample(size=(65, 64))),
            (65, 64),
            r"multiples of the stride 2 of module '0' \(AvgPool2d\), which gives 32x32",
            id="the model puts the sides right again",
        ),
        pytest.param(
            nn.Sequential(conv(1, 2, stride=4), conv(2, 2, stride=2)),
            (16, 24),
            r"at least 4 times the stride 8 of module '1' \(Conv2d\), which gives 2x3, got \(16, 24\)",
            id="small",
        ),
    ],
)
def test_sides_that_do_not_fit_are_refused(model, sides, match):
    """A layer that cannot be audited for its sides would leave the blame to another one."""
    with pytest.raises(ValueError, match=match):
        audit(model.double(), fresh(1, 1, *sides))


MISSED = {
    "no padding": (
        lambda: nn.Sequential(conv(1, 2), nn.Conv2d(2, 2, 3), conv(2, 2, mode="zeros")),
        [
            ("1", "its output of 30x30 is no grid over images of 32x32"),
            ("2", "its input of 30x30 is no grid over images of 32x32"),
        ],
    ),
    "a sequence of tokens": (
        lambda: nn.Sequential(conv(1, 8), nn.Flatten(2), nn.LayerNorm(1024)),
        [("1", "its output is no grid over the image"), ("2", "its input is no grid over the image")],
    ),
}


@pytest.mark.parametrize("case", MISSED)
def test_layers_without_a_row_are_in_the_headline(case):
    """Other sides do not help these, so every form of the report says which they are, and why, before the rest."""
    build, missed = MISSED[case]
    report = audit(build().double(), fresh(1, 1, 32, 32))
    assert [(s.name, s.reason) for s in report.missed()] == missed
    (first, reason), *_ = missed
    text = str(report)
    assert f"Not audited, and in no row: `{first}` (" in text
    assert reason in " ".join(text.split())
    assert report.summary().rows[0][0] == first
    assert set(report.summary().rows[0][2:]) == {"not audited"}
    assert report.to_markdown().startswith(f"**Not audited, and in no row: `{first}` (")
    assert "border: none of the audited modules adds more than rounding" in report.to_markdown()
    assert "Not audited" in report.plot().get_suptitle()
    assert AuditReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_nothing_is_missed_behind_the_last_grid():
    """A classifier's pool and head have no positions to lose, and what a row answers for is not missing."""
    head = nn.Sequential(conv(1, 2), nn.AdaptiveAvgPool2d(1), nn.Conv2d(2, 2, 1), nn.Flatten(), nn.Linear(2, 3))
    report = audit(head.double(), fresh(1, 1, 16, 16))
    assert len(report.skipped) == 5
    assert report.missed() == ()
    assert "Not audited" not in str(report)
    outside = nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(1, 2, 3)).double()
    assert audit(outside, fresh(1, 1, 16, 16)).missed() == ()


def test_files_of_older_versions_are_read():
    """They did not say which modules are missed, and a file in which none is does not say it either."""
    report = audit(nn.Sequential(conv(1, 2), nn.Flatten(), nn.Linear(512, 2)).double(), fresh(1, 1, 16, 16))
    data = report.to_dict()
    assert [set(module) for module in data["skipped"]] == [{"name", "kind", "reason"}] * 3
    assert AuditReport.from_dict(data) == report


def test_progress_announces_the_passes(capsys):
    """One to find the strides, and one per batch."""
    audit(conv(1, 2), fresh(5, 1, 16, 16), batch_size=2, progress=True)
    assert capsys.readouterr().err.startswith("audit: 4 passes\n")


class Shared(nn.Module):
    """One module twice, with a tensor by keyword and a mapping as the result."""

    def __init__(self):
        super().__init__()
        self.inner = Scaled()

    def forward(self, images):
        """Twice, with a pool between."""
        scale = images.new_full((len(images), 1, 1, 1), 2.0)
        once = self.inner(grid=images, scale=scale)["out"]
        return self.inner(grid=F.avg_pool2d(once, 2), scale=scale)


class Scaled(nn.Module):
    """A convolution and a factor for each image."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 2, 3, 3, dtype=torch.float64))

    def forward(self, grid, scale):
        """Zero-padded, scaled."""
        return {"note": None, "out": scale * F.conv2d(grid, self.weight, padding=1)}


def test_repeated_calls_keywords_and_mappings():
    """Each call has its row; other inputs keep the batch size of the images that are repeated."""
    report = audit(Shared(), fresh(3, 2, 16, 16), batch_size=2)
    assert [r.name for r in report.rows] == ["inner", "inner#2"]
    assert [r.stride for r in report.rows] == [1, 2]
    assert all(r.part("border") > 0 for r in report.rows)


class Pair(NamedTuple):
    """Two maps."""

    first: torch.Tensor
    second: torch.Tensor


class Sum(nn.Module):
    """Takes a named tuple."""

    def forward(self, pair):
        """Pool and add."""
        return F.avg_pool2d(pair.first + pair.second, 4)


class Pools(nn.Module):
    """Gives a named tuple to a child, whose grid has odd sides; on the way there is a grid 5/2 pixels apart."""

    def __init__(self):
        super().__init__()
        self.odd, self.sum = nn.Upsample(size=(8, 8)), Sum()

    def forward(self, images):
        """Look away from the odd one."""
        self.odd(images)
        return self.sum(Pair(images, images**2))


def test_odd_grids_and_named_tuples():
    """Sides of 5 have no Nyquist frequency; what lies between pixels is skipped; all grids move."""
    report = audit(Pools(), fresh(2, 1, 20, 20))
    assert [s.name for s in report.skipped] == ["odd"]
    assert row(report, "sum").part("aliasing") > 0
    assert row(report, "sum").part("border") == 0
    infinite = replace(report, rows=(replace(report.rows[0], border_error=math.inf),))
    text = json.dumps(infinite.to_dict(), allow_nan=False)
    assert json.loads(text)["rows"][0]["border_error"] == "inf"
    assert AuditReport.from_dict(json.loads(text)) == infinite


def test_result_does_not_depend_on_the_batch_size():
    """Sums are pooled before they are divided."""
    model, images = encoder("zeros", channel_multipliers=(1, 1), attention_levels=()), fresh(5, 1, 16, 16)
    one, all_at_once = (audit(model, images, batch_size=n) for n in (2, 5))
    for first, second in zip(one.rows, all_at_once.rows, strict=True):
        for field in ("whole_error", "sub_stride_error", "border_error", "global_error"):
            assert getattr(first, field) == pytest.approx(getattr(second, field), rel=1e-9, abs=1e-25)


class Weighted(nn.Module):
    """Multiplies every position by a number of its own: an error that is as large inside as beside the border."""

    def __init__(self):
        super().__init__()
        self.register_buffer("map", fresh(1, 1, 16, 16))

    def forward(self, images):
        """The products."""
        return images * self.map


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_an_error_of_the_inside_is_no_border_error_in_any_batch(batch_size):
    """In some batches the border has a little more of it, in others less; only all of them say which."""
    model, images = nn.Sequential(Weighted()), fresh(16, 1, 16, 16)
    found = [row(audit(model, images, batch_size=n), "0") for n in (16, batch_size)]
    assert found[0].border_error == pytest.approx(found[1].border_error, rel=1e-9, abs=1e-12)
    assert found[0].global_error == pytest.approx(found[1].global_error, rel=1e-9)


def test_strides_that_are_no_multiples_have_no_step_of_nothing():
    """From a stride of two to one of three, half a step is none, and would count as a shift without an error."""

    class Resampled(nn.Module):
        def forward(self, images):
            return nn.functional.interpolate(images, scale_factor=2 / 3, mode="nearest")

    model, images = nn.Sequential(nn.AvgPool2d(2), Resampled()), fresh(2, 1, 48, 48)
    steps = []
    add = UnitSums._add_aliasing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UnitSums, "_add_aliasing", lambda *a: (steps.append((a[3], a[2])), add(*a)))
        report = audit(model, images)
    assert Fraction(3, 2) in {ratio for ratio, _ in steps}
    assert all(any(direction) for _, direction in steps)
    assert row(report, "1").aliasing_error > 0


class Counts(nn.Module):
    """Counts its calls in a buffer, in place and by a new tensor, and trains a norm whatever its own flag says."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("others", torch.zeros(()))
        self.norm = nn.BatchNorm2d(1).double()

    def forward(self, images):
        """The normalized images."""
        self.calls += 1
        self.others = self.others + 1
        return self.norm.train()(images)


def test_buffers_are_put_back():
    """Also those of which a module makes new tensors; an optimizer or a graph may hold the old ones."""
    model = nn.Sequential(Counts(), conv(1, 1)).eval()
    before, values = dict(model.named_buffers()), {k: v.clone() for k, v in model.named_buffers()}
    audit(model, fresh(2, 1, 16, 16))
    after = dict(model.named_buffers())
    assert all(after[name] is tensor for name, tensor in before.items())
    assert all(torch.equal(after[name], value) for name, value in values.items())
    model(fresh(2, 1, 16, 16))
    assert model[0].calls == model[0].others == 1  # they do count
    assert not torch.equal(model[0].norm.running_mean, values["0.norm.running_mean"])


def test_a_model_around_the_audited_part_does_not_learn():
    """Behind ``run`` stands more than the part: its codebook, and norms that are no part either."""
    config = AutoencoderConfig(base_channels=8, channel_multipliers=(1, 2), norm_groups=4, num_codes=8, code_dim=4)
    model, images = VQAutoencoder(config).double().train(), fresh(2, 3, 16, 16)
    model(images)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    audit(model.encoder, images, run=lambda x: model(x))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    model(images)
    assert not torch.equal(model.quantizer.usage, before["quantizer.usage"])


class Fails(nn.Module):
    """Raises at its n-th call."""

    def __init__(self, calls):
        super().__init__()
        self.left = calls

    def forward(self, images):
        """Double, or raise."""
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("out of order")
        torch.rand(3)
        return images * 2


@pytest.mark.parametrize("calls", [1, 2, 3, 4, 100])
def test_the_model_is_left_as_it_was(calls):
    """Hooks, training flags, weights, random state; also if a pass or a repeated call fails."""
    model = nn.Sequential(conv(2, 2), nn.BatchNorm2d(2).double(), nn.Dropout(0.5), Fails(calls))
    model[0].eval()
    flags = [m.training for m in model.modules()]
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    images = fresh(2, 2, 16, 16)
    before, state = images.clone(), torch.get_rng_state()
    if calls < 100:
        with pytest.raises(RuntimeError, match="out of order"):
            audit(model, images)
    else:
        audit(model, images)
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, before)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Tokenizer(nn.Module):
    """A strided convolution and a quantizer."""

    def __init__(self, quantizer):
        super().__init__()
        self.encoder, self.quantizer = nn.Conv2d(1, 4, 3, 2, 1), quantizer

    def forward(self, images):
        """The codes."""
        return self.quantizer(self.encoder(images)).quantized


@pytest.mark.parametrize(
    "build",
    [
        lambda: VectorQuantizer(8, 4),
        lambda: ResidualVectorQuantizer(8, 4, num_quantizers=2, codebook_update="ema"),
        lambda: ProductQuantizer([VectorQuantizer(8, 2), VectorQuantizer(8, 2)]),
    ],
    ids=["vector", "residual", "product"],
)
def test_a_codebook_in_training_does_not_move(build):
    """What the last step has recorded stays pending, so its indices decode to its codes; eval() would move it."""
    model, images = Tokenizer(build()), fresh(4, 1, 16, 16).float()
    for _ in range(2):
        model(images)
    out = model.quantizer(model.encoder(images))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = audit(model, images)
    assert {row.name for row in report.rows} >= {"encoder"}
    assert model.quantizer.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.quantizer.decode(out.indices), out.codes)
    model.eval()
    assert not torch.equal(model.quantizer.decode(out.indices), out.codes)


def test_dropout_is_off_and_gradients_stay_away():
    """Random noise would pass for an error."""
    model = nn.Sequential(conv(2, 2), nn.Dropout(0.5))
    assert audit(model, fresh(2, 2, 16, 16)).rows[1].whole_error < 1e-20
    assert model[0].weight.grad is None


REFUSED = {
    "function": (
        lambda model, images: audit(lambda x: x, images),
        "module must be a torch.nn.Module, got func",
    ),
    "rank": (lambda model, images: audit(model, images[0]), r"images must be of shape \(B, C, H, W\)"),
    "integers": (lambda model, images: audit(model, images.long()), "images must be floating point"),
    "half precision": (
        lambda model, images: audit(model.half(), images.half()),
        r"images must be float32 or float64, .*, got torch.float16; pass model.float\(\) and images.float\(\)",
    ),
    "no image": (lambda model, images: audit(model, images[:0]), "images must be at least one, got 0"),
    "batch": (lambda model, images: audit(model, images, batch_size=0), "batch_size must be an int >= 1"),
    "whole": (
        lambda model, images: audit(model, images, whole=["two"]),
        "whole entry must be the name of a module, got 'two'",
    ),
    "letters": (
        lambda model, images: audit(model, images, whole="0"),
        "whole must be a collection of names, got the string '0'",
    ),
    "small": (
        lambda model, images: audit(
            nn.Sequential(nn.AvgPool2d(2), nn.Upsample(scale_factor=2), nn.AvgPool2d(3)), fresh(1, 1, 18, 18)
        ),
        "images sides must be at least 4 times the stride 6",
    ),
    "fraction of a token": (
        lambda model, images: audit(model, images, shifts=[(1, 0)]),
        "shifts must be multiples of the stride 2 within a quarter",
    ),
    "far": (
        lambda model, images: audit(model, images, shifts=[(8, 0)]),
        "shifts must be multiples of the stride 2 within a quarter",
    ),
    "whole token": (
        lambda model, images: audit(model, images, sub_stride_shifts=[(0, 2)]),
        "sub_stride_shifts must be below the stride 2",
    ),
    "identity": (lambda model, images: audit(model, images, shifts=[(0, 0)]), "without the identity"),
    "no shift": (lambda model, images: audit(model, images, shifts=[]), "shifts must be at least one"),
    "one number": (lambda model, images: audit(model, images, shifts=[2]), "must be a pair of ints"),
    "no grid": (
        lambda model, images: audit(nn.Flatten(), images),
        "module must be one that maps grids over the image to grids",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    """Each wrong argument has one clear error."""
    call, match = REFUSED[name]
    model, images = nn.Sequential(conv(1, 1), conv(1, 1, stride=2)), fresh(1, 1, 16, 16)
    types = ("function", "integers", "half precision", "one number", "letters")
    with pytest.raises(TypeError if name in types else ValueError, match=match):
        call(model, images)


@pytest.mark.parametrize(("model", "name"), [(nn.Sequential(conv(1, 1), conv(1, 1)), "1"), (conv(1, 1), "")])
def test_modules_that_compute_nan_are_named(model, name):
    """No error compares with NaN, so all would read exact. Finite weights are the control."""
    images = fresh(1, 1, 16, 16)
    audit(model, images)
    with pytest.raises(ValueError, match=r"^images must be finite, got 1 NaN or infinite of 256 values"):
        audit(model, torch.where(images == images.max(), math.inf, images))
    layer = model.get_submodule(name)
    layer.weight.data[0, 0, 0, 0] = math.nan
    match = rf"^module {re.escape(repr(name))} \(Conv2d\) must be finite, got 256 NaN or infinite of 256 values; "
    with pytest.raises(ValueError, match=match):
        audit(model, images)


@pytest.mark.parametrize("prepend", [False, True])
def test_hooks_of_others_run_once(prepend):
    """A repeated module calls them itself, so it is given what they were given."""
    model, images = nn.Sequential(conv(1, 1), nn.SiLU()), fresh(2, 1, 16, 16)
    assert audit(model, images).worst("global") is None
    model[0].register_forward_pre_hook(lambda _, args: (args[0] * 2 - 1,), prepend=prepend)
    report = audit(model, images)
    assert [report.worst(part) for part in ("border", "global")] == [None, None]
    model[0].padding_mode = "zeros"
    assert audit(model, images).worst("border").name == "0"


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_models_are_followed_as_they_were_written(fullgraph):
    """And are compiled as before afterwards."""
    model, images = nn.Sequential(conv(1, 1, mode="zeros"), nn.SiLU(), conv(1, 1)), fresh(2, 1, 16, 16)
    calls = []

    def backend(graph, _inputs):
        calls.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=fullgraph)
    rows = {row.name: row.border_error for row in audit(model, images).rows}
    found = {row.name: row.border_error for row in audit(compiled, images).rows}
    assert found == rows
    assert not calls
    compiled(images)
    assert len(calls) == 1


class Cast(nn.Module):
    """A change of dtype."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, images):
        """Cast."""
        return images.to(self.dtype)


def half_inside(dtype):
    """A convolution in half precision in a model of float32."""
    return nn.Sequential(Cast(dtype), conv(1, 1, mode="zeros").to(dtype), Cast(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("where", ["model", "run", "autocast"])
def test_half_precision_inside_is_refused(dtype, where):
    """Its rounding is as large as what padding loses, which would read exact. Wider dtypes tell both apart."""
    images = fresh(2, 1, 16, 16).float()
    model = {"model": half_inside(dtype), "run": conv(1, 1).to(dtype), "autocast": conv(1, 1).float()}[where]
    module = r"'0' \(Cast\)" if where == "model" else r"'' \(Conv2d\)"
    match = f"module {module} must compute in float32 or float64, .*, got {dtype}; call model.float"
    run = (lambda x: model(x.to(dtype))) if where == "run" else None
    autocast = torch.autocast("cpu", dtype, enabled=where == "autocast")
    with autocast, pytest.raises(TypeError, match=match + r"\(\) and leave torch.autocast"):
        audit(model, images, run=run)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_float32_and_float64_name_the_same_border_error():
    """What half precision is refused for can be seen in both."""
    model, images = conv(3, 3, mode="zeros"), fresh(2, 3, 16, 16)
    wide, single = audit(model, images), audit(model.float(), images.float())
    assert wide.rows[0].border_error > 1e-3
    assert single.rows[0].border_error == pytest.approx(wide.rows[0].border_error, rel=1e-4)
    assert [r.worst("border").name for r in (wide, single)] == ["", ""]


def small_report():
    """An audit of two modules, the first of which pads with zeros."""
    return audit(nn.Sequential(conv(1, 2, mode="zeros"), nn.SiLU()), fresh(1, 1, 16, 16))


def test_report_survives_json(tmp_path):
    """Strict JSON, and the same report from it, also from a file."""
    report = small_report()
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert json.loads(text)["rows"][0]["border_error"] == report.rows[0].border_error
    assert AuditReport.from_dict(json.loads(text)) == report
    assert AuditReport.from_dict(report.to_dict()) == report
    report.save(tmp_path / "audit.json")
    assert AuditReport.load(str(tmp_path / "audit.json")) == report


def test_report_is_frozen():
    """What was measured is not edited by accident."""
    report = small_report()
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'stride'"):
        report.stride = 2


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format": 2}, "format must be 1, got 2"),
        ({"extra": 1}, r"AuditReport fields must be \['image_size', .*'extra'"),
        ({"rows": [{"name": "0"}]}, r"AuditRow fields must be \['aliasing_error', .*got \['name'\]"),
    ],
)
def test_other_dictionaries_are_refused(changes, match):
    """Another format, an unknown field, a missing one."""
    data = small_report().to_dict()
    with pytest.raises(ValueError, match=match):
        AuditReport.from_dict(data | changes)


def test_report_is_a_table():
    """With every row, or with the losing ones."""
    report = small_report()
    table = report.to_markdown()
    assert "- border: `0` (Conv2d, pads (zeros)) at" in table
    assert "- aliasing: none adds more than rounding" in table
    assert "| 1 | SiLU | 1 |" in table
    assert "SiLU" not in report.to_markdown(losses_only=True)


def test_rows_of_similar_paths_print_differently():
    """A path is cut in front: its end tells the convolutions of a block apart."""
    report = small_report()
    row = replace(report.rows[0], kind="PaddedConv2d", padding="pads (circular)")
    paths = [f"tokenizer.encoder.levels.1.block0.conv{number}" for number in (1, 2)]
    lines = str(replace(report, rows=tuple(replace(row, name=path) for path in paths))).splitlines()[2:4]
    assert [line.split()[0][-13:] for line in lines] == [path[-13:] for path in paths]


@pytest.mark.parametrize(
    ("count", "told"),
    [(1, "1 module was not audited on its own."), (2, "2 modules were not audited on their own.")],
)
def test_modules_without_a_row_are_counted(count, told):
    """In the singular and in the plural, as the images are."""
    report = small_report()
    assert "audited on" not in str(report)
    skipped = (SkippedModule("2", "Linear", "it has no positions"),) * count
    text = " ".join(str(replace(report, skipped=skipped, num_images=count)).split())
    assert text.endswith(told)
    assert f" {count} image{'s' * (count - 1)} of 16x16 pixels" in text


def test_decibels_of_nothing_and_of_everything():
    """An exact result has infinitely many."""
    assert decibels(0.0) == math.inf
    assert decibels(math.inf) == -math.inf
    assert decibels(0.01) == pytest.approx(20)


@pytest.mark.parametrize("ask", [lambda r: r.worst("corner"), lambda r: r.rows[0].part("corner")])
def test_unknown_parts_are_refused(ask):
    """With the list of those that there are."""
    report = small_report()
    with pytest.raises(ValueError, match="part must be one of 'border', 'global', 'aliasing', got 'corner'"):
        ask(report)


def test_constant_features_have_no_signal_to_lose():
    """No division by zero: nothing lost of nothing is exact, something lost of nothing is infinite."""
    report = audit(nn.Sequential(conv(1, 2), conv(2, 2, mode="zeros")), torch.ones(1, 1, 16, 16).double())
    assert row(report, "0").part("border") == 0
    assert row(report, "1").part("border") > 0
    zero = audit(nn.Sequential(nn.ReLU()), -torch.ones(1, 1, 16, 16))
    assert zero.rows[0].whole_error == 0


def test_pictures_show_every_row_and_the_culprits(tmp_path):
    """One tick a module, bars as long as the losses, the worst in the legend; also where nothing is lost."""
    report = audit(encoder("zeros"), fresh(1, 1, 32, 32))
    figure = report.plot()
    after, added = figure.axes
    labels = [tick.get_text() for tick in after.get_yticklabels()]
    assert labels == [f"{r.name} ({r.kind})" for r in report.rows]
    legend = " ".join(text.get_text() for text in added.get_legend().get_texts())
    assert all(worst.name in legend for worst in report.culprits().values())
    ends = sorted(bar.get_x() + bar.get_width() for bar in added.patches if not math.isnan(bar.get_width()))
    parts = ("border", "global", "aliasing")
    losses = [decibels(r.part(p)) for r in report.rows for p in parts if r.part(p)]
    assert ends == pytest.approx(sorted(losses))
    assert all(bar.get_x() > max(losses) for bar in added.patches)
    first, last = after.get_xlim()
    assert first > max(losses) > min(losses) > last
    figure.savefig(tmp_path / "audit.png")
    assert f"stride {report.stride}" in [text.get_text() for text in after.texts]
    exact = audit(nn.Sequential(nn.SiLU()), fresh(1, 1, 16, 16)).plot()
    assert "border: nothing" in [t.get_text() for t in exact.axes[1].get_legend().get_texts()]
    infinite = replace(report, rows=(replace(report.rows[0], border_error=math.inf, whole_error=math.inf),))
    infinite.plot().savefig(tmp_path / "infinite.png")


def test_constant_image_probe_measures_a_known_pattern():
    """A grid of period 4, a ring two pixels wide and nothing else: each is found with its own size."""
    pattern = fresh(1, 2, 4, 4)
    ring = torch.zeros(24, 32, dtype=torch.float64)
    ring[:2] = ring[-2:] = 5.0
    ring[:, :2] = ring[:, -2:] = 5.0

    def function(codes):
        return pattern.repeat(len(codes), 1, 6, 8) + ring + 3.0

    for margin in (None, 6):
        report = constant_image_probe(function, torch.ones(2, 7, 6, 8), stride=4, margin=margin)
        expected = pattern - pattern.mean((2, 3), keepdim=True)
        assert report.margin == (4 if margin is None else 6)
        assert torch.allclose(report.phases, expected[0])
        assert report.grid_error == pytest.approx(float(expected.square().mean().sqrt()))
        assert report.rest < 1e-12
        border = 24 * 32 - (24 - 2 * report.margin) * (32 - 2 * report.margin)
        assert report.border_error == pytest.approx(5 * math.sqrt((24 * 32 - 20 * 28) / border))
        assert report.profile[:2] == pytest.approx((5.0, 5.0))
        assert max(report.profile[2:]) < 1e-12
    json.dumps(report.to_dict(), allow_nan=False)
    assert "grid: period 4" in report.to_markdown()


def test_constant_image_probe_tells_decoders_apart(tmp_path):
    """Transposed convolutions draw a grid, nearest upsampling with circular padding draws none."""
    codes = fresh(1, 3, 1, 1).expand(1, 3, 8, 8)
    transposed = nn.ConvTranspose2d(3, 1, 3, 2, 1, output_padding=1).double()
    circular = nn.Sequential(nn.Upsample(scale_factor=2), conv(3, 1))
    zeros = nn.Sequential(nn.Upsample(scale_factor=2), conv(3, 1, mode="zeros"))
    grid, none, ring = (constant_image_probe(f, codes, stride=2) for f in (transposed, circular, zeros))
    assert grid.grid_error > 1e-3
    assert none.grid_error < 1e-12 > none.border_error
    assert ring.grid_error < 1e-12
    assert ring.border_error > 1e-3
    for report in (grid, none):
        figure = report.plot()
        assert len(figure.axes) >= 4
        figure.savefig(tmp_path / "grid.png")


ONES = torch.ones(1, 1, 8, 8)


@pytest.mark.parametrize(
    ("function", "constant", "options", "error", "match"),
    [
        (
            lambda z: z,
            torch.eye(8)[None, None],
            {"stride": 1},
            ValueError,
            "constant must be the same at all places of a channel",
        ),
        (lambda z: z, ONES.long(), {"stride": 1}, TypeError, "constant must be floating point"),
        (
            lambda z: z[0],
            ONES,
            {"stride": 1},
            ValueError,
            r"function\(constant\) must be of shape \(B, I, H, W\)",
        ),
        (lambda z: z.long(), ONES, {"stride": 1}, TypeError, r"function\(constant\) must be floating point"),
        (lambda z: z, ONES, {"stride": 3}, ValueError, "sides must be divisible by the stride 3"),
        (
            lambda z: z,
            ONES,
            {"stride": 2, "margin": 3},
            ValueError,
            "margin must be one that leaves two periods of 2",
        ),
        (lambda z: z, ONES, {"stride": 0}, ValueError, "stride must be an int >= 1"),
        (lambda z: z, ONES, {"stride": 1, "margin": -1}, ValueError, "margin must be an int >= 0"),
    ],
)
def test_constant_image_probe_refusals(function, constant, options, error, match):
    """What is not constant, not an image, or too small."""
    with pytest.raises(error, match=match):
        constant_image_probe(function, constant, **options)
