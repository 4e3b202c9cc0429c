"""The judge of equivariance, and the strategies that feed it."""

import builtins
import itertools
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from te_quant import testing
from te_quant.functional import nearest_code
from te_quant.shifts import roll
from te_quant.testing import (
    assert_shift_equivariant,
    equivariance_error,
    latents_off_boundaries,
    phase_token_shift,
)
from tests.helpers import numpy_generator

quick = settings(deadline=None, max_examples=25)


def network(mode, stride=1):
    """Convolution, nonlinearity, convolution with a stride."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode=mode),
        nn.SiLU(),
        nn.Conv2d(4, 3, 3, stride, 1, padding_mode=mode),
    ).double()


def tokens(images):
    """Integers from means over 2x2 cells; exact for even circular shifts."""
    cells = images[..., ::2, ::2] + images[..., 1::2, ::2] + images[..., ::2, 1::2] + images[..., 1::2, 1::2]
    return (cells.sum(1) * 8).floor().long()


def polyphase(images):
    """The component with the largest norm, and its phase (rows, columns)."""
    phases = [(p, q) for p in (0, 1) for q in (0, 1)]
    parts = torch.stack([images[..., p::2, q::2] for p, q in phases], 1)
    best = parts.square().sum((2, 3, 4)).argmax(1)
    return parts[torch.arange(len(images)), best], torch.tensor(phases)[best]


@quick
@given(
    testing.images(testing.image_sides(4, smallest=8, largest=16), channels=2), testing.shifts(6, multiple_of=2)
)
def test_circular_network_passes_at_its_stride(images, shift):
    """In float64, at any multiple of the stride, feature maps and indices."""
    assert_shift_equivariant(network("circular", 2), images, shifts=[shift], stride=2)
    assert_shift_equivariant(tokens, images, shifts=[shift], stride=2)


@quick
@given(testing.images((8, 12), channels=2), testing.shifts(5))
def test_error_is_that_of_numpy(images, shift):
    """Largest difference, its place and its values, against a roll and a search in NumPy."""
    model = network("zeros")
    error = equivariance_error(model, images, shift)
    with torch.no_grad():
        expected = np.roll(model(images).numpy(), shift, (2, 3))
        actual = model(torch.from_numpy(np.roll(images.numpy(), shift, (2, 3)))).numpy()
    difference = np.abs(expected - actual)
    assert error.max_error == pytest.approx(difference.max(), abs=1e-12)
    assert error.relative_error == pytest.approx(difference.max() / np.abs(expected).max(), abs=1e-12)
    assert error.compared == difference.size
    b, c, y, x = np.unravel_index(difference.argmax(), difference.shape)
    assert error.position == (b, c, (y - shift[0]) % 8, (x - shift[1]) % 12)
    assert error.expected == pytest.approx(expected[b, c, y, x])
    assert error.actual == pytest.approx(actual[b, c, y, x])


@pytest.mark.parametrize(
    ("shifts", "match"),
    [
        ([(0, 0), (0, 3), (1, 0)], r"not equivariant at shift \(0, 3\): relative error .*tolerance 1e-10"),
        ([(0, 3)], r"largest at \(\d, \d, \d+, \d+\): expected .*, got .*at the padding"),
    ],
)
def test_zero_padding_fails_and_is_suspected(shifts, match):
    """The negative control; the message names the shift, the place, the size and the padding."""
    with pytest.raises(AssertionError, match=match):
        assert_shift_equivariant(network("zeros"), torch.rand(2, 2, 32, 32).double(), shifts=shifts)


def test_strided_network_fails_at_one_pixel():
    """Judged as if it had stride 1 by its repeated output, it does not follow; the error is all over the map."""
    images = torch.rand(1, 2, 48, 48).double() * 2 - 1
    model = nn.Sequential(network("circular", 2), nn.Upsample(scale_factor=2))
    assert_shift_equivariant(model, images, shifts=[(2, 4)])
    with pytest.raises(AssertionError, match=r"at shift \(1, 0\).*all over the map"):
        assert_shift_equivariant(model, images, shifts=[(1, 0)])


def test_first_differing_index_is_named():
    """One wrong token at a known place, in images two of three."""

    def one_wrong(images):
        output = tokens(images)
        # The image knows by its own corner whether it was shifted.
        if images[0, 0, 0, 0] != marked[0, 0, 0, 0]:
            output[1, 2, 3] += 7
            output[2, 0, 0] += 1
        return output

    marked = torch.rand(3, 1, 8, 8)
    error = equivariance_error(one_wrong, marked, (2, 4), stride=2)
    assert (error.differing, error.compared, error.rate) == (2, 48, 2 / 48)
    assert error.position == (1, 1, 1)
    assert error.actual == error.expected + 7
    assert error.max_error == 7
    assert error.is_indices
    place = rf"first at \(1, 1, 1\): expected {int(error.expected)}, got {int(error.actual)}"
    with pytest.raises(AssertionError, match=r"2 of 48 indices differ \(0 of them may\); " + place):
        assert_shift_equivariant(one_wrong, marked, shifts=[(2, 4)], stride=2)
    assert_shift_equivariant(one_wrong, marked, shifts=[(2, 4)], stride=2, tolerance=0.05)
    with pytest.raises(AssertionError, match="indices differ"):
        assert_shift_equivariant(one_wrong, marked, shifts=[(2, 4)], stride=2, tolerance=0.04)


@quick
@given(testing.images((8, 12), channels=1), testing.shifts(7))
def test_polyphase_passes_with_its_own_law(images, shift):
    """Every integer shift, each image by its own number of tokens; not with the plain law."""
    law = phase_token_shift(lambda x: polyphase(x)[1], 2)
    assert_shift_equivariant(lambda x: polyphase(x)[0], images, shifts=[shift], stride=2, token_shift=law)
    error = equivariance_error(lambda x: polyphase(x)[0], images, shift, stride=2, token_shift=law)
    assert error.differing == 0
    assert error.position is None
    assert math.isnan(error.near_border)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_offsets_of_any_integer_dtype_give_the_same_law(dtype):
    """Differences of bytes must not wrap around."""
    images = torch.arange(2).view(2, 1, 1, 1).expand(2, 1, 8, 8).float()
    law = phase_token_shift(lambda x: x[:, 0, 0, :2].to(dtype), 2)
    found = law(images, 1 - images, (1, 1))
    assert found.tolist() == [[0, 0], [1, 1]]


def test_offsets_that_are_no_integers_are_refused():
    """They would be rounded."""
    law = phase_token_shift(lambda x: x[:, 0, 0, :2], 2)
    with pytest.raises(TypeError, match=r"offsets\(images\) must be an integer tensor, got torch.float32"):
        law(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8), (1, 1))


def test_a_law_that_is_off_by_one_token_fails():
    """The tokens are where it does not look for them."""
    law = phase_token_shift(lambda x: polyphase(x)[1], 2)
    with pytest.raises(AssertionError, match="no multiple of the stride, so at the downsampling layers"):
        assert_shift_equivariant(
            lambda x: polyphase(x)[0],
            torch.rand(2, 1, 8, 8),
            shifts=[(1, 0)],
            stride=2,
            token_shift=lambda *a: law(*a) + 1,
        )


def test_offsets_that_do_not_follow_the_images_are_refused():
    """No whole number of tokens would be the law."""
    law = phase_token_shift(lambda x: torch.zeros(2, 2, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="offsets must be such that t \\+ o - o' is a multiple of the stride 2"):
        equivariance_error(tokens, torch.rand(2, 1, 8, 8), (1, 0), stride=2, token_shift=law)


@pytest.mark.parametrize("wrong", [torch.zeros(2, 2), torch.zeros(1, 2, dtype=torch.int64), (0, 0)])
def test_laws_without_integers_for_every_image_are_refused(wrong):
    """Floats, one for all images, and a pair."""
    with pytest.raises(ValueError, match=r"token_shift\(...\) must be an integer tensor of shape \(2, 2\)"):
        equivariance_error(tokens, torch.rand(2, 1, 8, 8), (1, 0), stride=2, token_shift=lambda *_: wrong)


def test_canvas_and_crop():
    """Content on its ground, and a window over a larger image; places count from the corner of the output."""
    images = torch.full((1, 1, 16, 16), -1.0)
    images[..., 6:10, 6:10] = torch.rand(4, 4)
    shifts = [(2, -4), (-6, 0)]
    assert_shift_equivariant(tokens, images, shifts=shifts, stride=2, protocol="canvas")
    noise = torch.rand(1, 1, 24, 24)
    assert_shift_equivariant(tokens, noise, shifts=[(2, -4)], stride=2, protocol="crop", size=(16, 16))
    with pytest.raises(AssertionError, match=r"at shift \(2, -4\)"):
        assert_shift_equivariant(tokens, noise, shifts=[(2, -4)], stride=1, protocol="crop", size=(16, 16))

    def marks_a_corner(x):
        output = tokens(x)
        output[:, 0, 7] = 99
        return output

    error = equivariance_error(marks_a_corner, images, (-2, 4), stride=2, protocol="canvas")
    # The corner (0, 7) of the shifted map is (1, 5) of the other, whose own corner has left.
    assert error.position == (0, 1, 5)
    assert (error.actual, error.differing) == (99, 1)
    assert error.compared == 7 * 6


def decoder(mode):
    """One token in, 4x4 pixels out."""
    return nn.Sequential(
        nn.ConvTranspose2d(2, 4, 2, 2),
        nn.SiLU(),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode),
        nn.Upsample(scale_factor=2),
    ).double()


@pytest.mark.parametrize("protocol", ["circular", "crop"])
def test_decoders_move_many_pixels_per_token(protocol):
    """Pixels move by the factor times the shift of the tokens; zero padding and another factor fail."""
    codes = torch.rand(2, 2, 8, 6).double() * 2 - 1
    options = {"shifts": [(1, 0), (-1, 1)], "protocol": protocol}
    options |= {"size": (6, 4)} if protocol == "crop" else {}
    pointwise = decoder("circular")
    if protocol == "crop":
        pointwise[2] = nn.Conv2d(4, 4, 1).double()
    assert_shift_equivariant(pointwise, codes, upsampling=4, **options)
    with pytest.raises(AssertionError, match=r"at shift \(1, 0\).*at the padding"):
        assert_shift_equivariant(decoder("zeros"), codes.repeat(1, 1, 4, 4), upsampling=4, shifts=[(1, 0)])
    with pytest.raises(AssertionError, match=r"at shift \(1, 0\)"):
        assert_shift_equivariant(pointwise, codes, upsampling=2, **options)


def test_decoders_take_indices():
    """Integer tokens without a channel axis, in any protocol; the place is that of the pixel."""
    table = torch.rand(7)

    def decode(indices):
        return table[indices].repeat_interleave(3, 1).repeat_interleave(3, 2)

    indices = torch.randint(0, 7, (2, 4, 5))
    assert_shift_equivariant(decode, indices, shifts=[(1, -2)], upsampling=3)
    assert_shift_equivariant(decode, indices, shifts=[(1, -1)], upsampling=3, protocol="crop", size=(2, 3))

    def marks(x):
        output = decode(x)
        return (
            output
            if x.equal(indices)
            else output.index_put((torch.tensor(1), *torch.tensor([8, 2])), output.new_tensor(9))
        )

    error = equivariance_error(marks, indices, (1, 0), upsampling=3)
    assert (error.position, error.differing) == ((1, 5, 2), 1)


def test_stride_and_upsampling_combine():
    """A network with both moves by their quotient, which has to be whole."""
    model = nn.Sequential(nn.AvgPool2d(4), nn.Upsample(scale_factor=2)).double()
    images = torch.rand(1, 1, 16, 16).double()
    assert_shift_equivariant(model, images, shifts=[(4, -8)], stride=4, upsampling=2)
    with pytest.raises(
        ValueError, match="shift must be such that shift \\* upsampling 2 is a multiple of the stride 4"
    ):
        assert_shift_equivariant(model, images, shifts=[(1, 0)], stride=4, upsampling=2)


def enlarge(images):
    """One position becomes four by four, of which the first keeps the value."""
    return nn.functional.interpolate(images, scale_factor=4) * torch.linspace(0, 1, images.shape[-1] * 4)


@pytest.mark.parametrize(
    ("function", "options", "told"),
    [
        (nn.AvgPool2d(4), {}, "The output is 4x2 for images of 16x8; pass stride=4."),
        (nn.AvgPool2d(4), {"stride": 2}, "The output is 4x2 for images of 16x8; pass stride=4."),
        (network("zeros"), {"stride": 2}, "The output is 16x8 for images of 16x8; pass stride=1."),
        (enlarge, {}, "The output is 64x32 for an input of 16x8; pass upsampling=4."),
        (enlarge, {"stride": 2}, "The output is 64x32 for an input of 16x8; pass stride=1 and upsampling=4."),
    ],
)
def test_a_call_with_another_stride_is_named(function, options, told):
    """Before any layer is: the sides of the output say that the call is wrong."""
    images = torch.rand(1, 2, 16, 8).double()
    with pytest.raises(AssertionError, match=re.escape(told)) as got:
        assert_shift_equivariant(function, images, shifts=[(2, 0)], **options)
    assert "Where to look" not in str(got.value)


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (network("zeros", 2), {"stride": 2}),
        (lambda x: nn.functional.pad(x, (1, 1)) ** 2, {"protocol": "crop", "size": (12, 4)}),
        (enlarge, {"upsampling": 4}),
        (network("zeros", 2), {"token_shift": lambda x, _, __: torch.ones(len(x), 2, dtype=torch.int64)}),
    ],
    ids=["stride", "crop", "upsampling", "law"],
)
def test_a_call_that_fits_blames_layers(function, options):
    """Negative control: the sides agree with the call, or need not."""
    with pytest.raises(AssertionError, match="Where to look"):
        assert_shift_equivariant(function, torch.rand(1, 2, 16, 8).double(), shifts=[(2, 2)], **options)


@pytest.mark.parametrize(
    ("layer", "options", "told"),
    [
        (nn.Conv2d(2, 2, 3), {}, "14x6 for images of 16x8, but a circular shift needs 16x8 at stride=1"),
        (
            nn.Conv2d(2, 2, 3, 2),
            {"stride": 2},
            "7x3 for images of 16x8, but a circular shift needs 8x4 at stride=2",
        ),
        (
            nn.Conv2d(2, 2, (1, 3), (1, 2), (0, 1)),
            {},
            "16x4 for images of 16x8, but a circular shift needs 16x8 at stride=1",
        ),
        (
            nn.ConvTranspose2d(2, 2, 5, 2),
            {"upsampling": 2},
            "35x19 for an input of 16x8, but a circular shift needs 32x16 at stride=1 and upsampling=2",
        ),
    ],
    ids=["stride 1", "stride 2", "one axis", "decoder"],
)
def test_an_output_of_other_sides_is_named(layer, options, told):
    """It cannot be rolled along with the images, so neither a border nor a layer is to blame."""
    images = torch.rand(1, 2, 16, 8).double()
    told = told.replace("*", "but a circular shift needs")
    with pytest.raises(AssertionError, match=re.escape(f"The output is {told}: pad circularly")) as got:
        assert_shift_equivariant(layer.double(), images, shifts=[(2, 2)], **options)
    assert "Where to look" not in str(got.value)


def test_sides_that_are_no_multiples_of_the_stride_are_named():
    """A circular layer has nothing to pad: its images do not fit. With sides that do, it passes."""
    layer = nn.Conv2d(1, 1, 5, 4, 2, padding_mode="circular").double()
    told = "8x8 for images of 30x30, but a circular shift needs 7.5x7.5 at stride=4: pass inputs whose sides are "
    with pytest.raises(AssertionError, match=re.escape(told + "multiples of 4.")):
        assert_shift_equivariant(layer, torch.rand(1, 1, 30, 30).double(), shifts=[(4, 0)], stride=4)
    assert_shift_equivariant(layer, torch.rand(1, 1, 28, 32).double(), shifts=[(4, 0)], stride=4)


def test_an_error_beside_the_border_and_inside_has_two_causes():
    """Rows that are counted are wrong everywhere, and most where they wrap around; padding only at the border."""
    images = torch.rand(2, 1, 8, 8).double()
    layer = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular").double()
    rows = torch.arange(8.0).double()[:, None]
    both = r"so at the padding, and for the rest at what acts everywhere: absolute positions"
    with pytest.raises(AssertionError, match=both):
        assert_shift_equivariant(lambda x: layer(x) + rows, images, shifts=[(1, 0)])
    padded = nn.Conv2d(1, 1, 3, padding=1).double()
    with pytest.raises(AssertionError, match=r"so at the padding\. te_quant"):
        assert_shift_equivariant(padded, images, shifts=[(1, 0)])


@pytest.mark.parametrize(
    ("layout", "told"),
    [
        (
            lambda x: x.movedim(1, -1),
            "The output is (B, h, w, ...), (1, 4, 2, 2), but positions must be its last two",
        ),
        (
            lambda x: x.flatten(2).mT,
            "The output is a sequence, (1, 8, 2), but positions must be its last two axes: ",
        ),
        (
            lambda x: x.flatten(2),
            "The output is a sequence, (1, 2, 8), but positions must be its last two axes: resh",
        ),
    ],
    ids=["channels last", "sequence", "channels first"],
)
def test_an_output_in_another_layout_is_named(layout, told):
    """Its sides are not those of a map, whatever is padded; the cure that is named works."""
    layer, images = nn.Conv2d(2, 2, 4, 4).double(), torch.rand(1, 2, 16, 8).double()
    with pytest.raises(AssertionError, match=re.escape(told)) as got:
        assert_shift_equivariant(lambda x: layout(layer(x)), images, shifts=[(4, 4)], stride=4)
    assert "pad circularly" not in str(got.value)
    assert_shift_equivariant(layer, images, shifts=[(4, 4)], stride=4)


def test_the_cure_for_an_unpadded_layer_works():
    """A window, or circular padding."""
    layer, images = nn.Conv2d(2, 2, 3).double(), torch.rand(1, 2, 16, 12).double()
    assert_shift_equivariant(layer, images, shifts=[(2, 2)], protocol="crop", size=(12, 8))
    assert_shift_equivariant(
        lambda x: layer(nn.functional.pad(x, (1, 1, 1, 1), mode="circular")), images, shifts=[(2, 2)]
    )


@pytest.mark.parametrize(
    "reduce", [lambda z: z.mean((2, 3)), lambda z: z.mean((1, 2, 3)), lambda z: z.mean((2, 3)).argmax(1)]
)
def test_outputs_without_positions_must_not_change(reduce):
    """(B, K) and (B,), floating or integer."""
    images = torch.rand(3, 2, 8, 8).double()
    model = network("circular")
    assert_shift_equivariant(lambda x: reduce(model(x)), images, shifts=[(1, 0), (2, -3)])


def test_what_changes_without_positions_is_not_invariant():
    """Named as such, with the image and the channel; flat tokens are the likely mistake."""
    images = torch.rand(3, 1, 8, 8).double()
    assert_shift_equivariant(lambda x: x.flatten(1).sum(1, keepdim=True), images, shifts=[(0, 1)])
    weight = torch.arange(8.0, dtype=torch.float64)

    def positions(x):
        return torch.stack([x.sum((1, 2, 3)), (x * weight).sum((1, 2, 3))], 1)

    error = equivariance_error(positions, images, (0, 1))
    assert error.is_invariant
    assert math.isnan(error.near_border)
    assert error.position[1] == 1
    message = (
        r"not invariant at shift \(0, 1\): relative error .* largest at \(\d, 1\).*position \(image, channel\)"
    )
    with pytest.raises(
        AssertionError, match=message + r".*positions in its axis, reshape it to \(B, \.\.\., h, w\)"
    ):
        assert_shift_equivariant(positions, images, shifts=[(0, 1)])
    with pytest.raises(AssertionError, match=r"not invariant .* of 192 indices differ"):
        assert_shift_equivariant(lambda x: (x > 0.5).flatten(1).long(), images, shifts=[(0, 1)])


def test_random_functions_are_called_random():
    """Dropout in training mode, noise on indices, and a state that changes; not a border, and not NaN."""
    images = torch.rand(2, 2, 16, 16).double()
    says = r"not equivariant at shift .* the function is random .* two calls on the same images differ .*eval\(\)"
    noisy = nn.Sequential(network("circular"), nn.Dropout(0.5))
    with pytest.raises(AssertionError, match=says):
        assert_shift_equivariant(noisy, images, shifts=[(0, 1)])
    assert_shift_equivariant(noisy.eval(), images, shifts=[(0, 1)])
    with pytest.raises(AssertionError, match=says):
        assert_shift_equivariant(
            lambda x: tokens(x) + torch.randint(0, 2, (2, 8, 8)), images, shifts=[(0, 2)], stride=2
        )
    with pytest.raises(AssertionError, match=r"not invariant.*the function is random"):
        assert_shift_equivariant(lambda x: torch.rand(2, 3), images, shifts=[(0, 1)])
    for steady in (network("zeros"), lambda x: x * math.nan):
        with pytest.raises(AssertionError, match=r"^(?!.*random)"):
            assert_shift_equivariant(steady, images, shifts=[(0, 1)])


def test_nan_and_infinity_are_differences():
    """Equal infinities pass; NaN never does."""
    images = torch.rand(1, 1, 4, 4)
    assert equivariance_error(lambda x: torch.full_like(x, math.inf), images, (1, 1)).differing == 0
    for value in (math.nan, math.inf):
        error = equivariance_error(
            lambda x, v=value: torch.full_like(x, v if x.equal(images) else 1.0), images, (1, 1)
        )
        assert error.max_error == math.inf
        assert error.near_border > 0


def spoil(value, when):
    """Put a value at one place, for the images for which ``when`` holds."""

    def function(x):
        y = x.clone()
        if when(x):
            y[1, 0, 2, 3] = value
        return y

    return function


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_outputs_that_are_not_finite_are_named(value):
    """Their place, and for which images; no layer is suspected, and no function called random."""
    images = torch.rand(2, 1, 4, 6)
    number = r"0\.\d+"
    # What is at (2, 3) of the shifted images was at (1, 1) before.
    cases = [
        (lambda x: x.equal(images), value, r"\(1, 0, 2, 3\)", number),
        (lambda x: not x.equal(images), number, r"\(1, 0, 1, 1\)", value),
    ]
    if math.isnan(value):
        cases.append((lambda _: True, "(nan|0)", r"\(1, 0, \d, \d\)", "(nan|0)"))
    for when, before, place, after in cases:
        match = rf"^not equivariant at shift \(1, 2\): the output is {before}.* at {place} .* unshifted images, "
        match += rf"and {after}.* for shifted ones\. Find where the function first makes NaN or infinity"
        with pytest.raises(AssertionError, match=match) as got:
            assert_shift_equivariant(spoil(value, when), images, shifts=[(1, 2)])
        assert not re.search("stride|attention|random|relative error", str(got.value))
    images[1, 0, 2, 3] = math.nan
    with pytest.raises(AssertionError, match=r"the output is nan at .*The images have NaN or infinity themselves"):
        assert_shift_equivariant(lambda x: x * 2, images, shifts=[(1, 2)])
    with pytest.raises(AssertionError, match=r"^not invariant .* nan at \(1, 0\) \(position \(image, channel\)"):
        assert_shift_equivariant(lambda x: x.sum((2, 3)), images, shifts=[(1, 2)])


@pytest.mark.parametrize("sign", [1, -1])
def test_an_infinity_does_not_make_other_differences_small(sign):
    """Beside an infinity in the same place every time the rest is compared by the largest finite value."""
    images = torch.rand(1, 1, 4, 4, dtype=torch.float64)
    scales = itertools.cycle([1.0, 0.75])

    def broken(x):
        y = torch.arange(1.0, 17, dtype=x.dtype).reshape(1, 1, 4, 4) * next(scales)
        y[..., 3, 3] = sign * math.inf
        return y

    error = equivariance_error(broken, images, (0, 0))
    assert error.differing == 15
    assert error.relative_error == 0.25
    with pytest.raises(AssertionError, match=r"relative error 0\.25 "):
        assert_shift_equivariant(broken, images, shifts=[(0, 0)])
    with pytest.raises(AssertionError, match=r"the output is .*inf .*But the function is random"):
        assert_shift_equivariant(broken, images, shifts=[(1, 0)])

    def masked(x):
        return x.masked_fill(x > 0.5, sign * math.inf)

    assert_shift_equivariant(masked, images, shifts=[(1, 2)])


@pytest.mark.parametrize("dtype", list(testing.TOLERANCES))
def test_tolerance_of_each_dtype_tells_rounding_from_a_border(dtype):
    """The circular network passes, the zero-padded one fails."""
    images = (torch.rand(2, 2, 16, 16) * 2 - 1).to(dtype)
    shifts = [(1, 2), (-5, 7)]
    assert_shift_equivariant(network("circular").to(dtype), images, shifts=shifts)
    zeros = network("zeros").to(dtype)
    for parameter in zeros[0].parameters():
        parameter.data.mul_(3)
    with pytest.raises(AssertionError, match=str(dtype)):
        assert_shift_equivariant(zeros, images, shifts=shifts)


def test_function_may_write_into_its_input():
    """Both views are copies."""
    images = torch.rand(1, 1, 4, 4)
    before = images.clone()
    assert equivariance_error(lambda x: x.mul_(2), images, (1, 0)).differing == 0
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("function", "shift", "options", "error", "match"),
    [
        (tokens, (0, 0), {"stride": 0}, ValueError, "stride must be an int >= 1"),
        (tokens, (0, 0), {"upsampling": 0}, ValueError, "upsampling must be an int >= 1"),
        (tokens, (1, 0), {"stride": 2}, ValueError, "shift must be a multiple of the stride 2, as no token_shift"),
        (tokens, (0, 0), {"protocol": "mirror"}, ValueError, "protocol must be one of"),
        (
            tokens,
            (0, 0),
            {"protocol": "crop"},
            ValueError,
            r"size must be \(height, width\) under the crop protocol",
        ),
        (lambda x: (x,), (0, 0), {}, TypeError, r"function\(images\) must be .* tensor, got tuple"),
        (
            lambda x: x[:0],
            (0, 0),
            {},
            ValueError,
            r"function\(images\) must be one output per image, 1, got 0",
        ),
        (lambda x: x > 0, (0, 0), {}, TypeError, r"function\(images\) must be .* tensor, got torch.bool"),
        (lambda x: x[0, 0], (0, 0), {}, ValueError, r"function\(images\) must be of shape \(B, ..., h, w\)"),
        (
            lambda x: x if x[0, 0, 4, 4] > 0 else x[..., 1:],
            (1, 0),
            {},
            ValueError,
            r"of one shape .* before and after the shift",
        ),
        (
            lambda x: x[..., :1, :1],
            (1, 0),
            {"protocol": "canvas"},
            ValueError,
            r"shift must be one that leaves .*, got \(1, 0\); the output has 1x1 positions: pass larger images",
        ),
    ],
)
def test_refusals(function, shift, options, error, match):
    """Each wrong argument has one clear error."""
    images = torch.full((1, 1, 8, 8), -1.0)
    images[..., 4, 4] = 1.0
    with pytest.raises(error, match=match):
        equivariance_error(function, images, shift, **options)


def test_one_image_without_a_batch_is_refused():
    """By its shape."""
    with pytest.raises(ValueError, match=r"images must be of shape \(B, C, H, W\)"):
        equivariance_error(tokens, torch.rand(1, 8, 8), (0, 0))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"shifts": []}, "shifts must be at least one"),
        ({"shifts": [(0, 0)], "tolerance": -1}, "tolerance must be a finite number >= 0"),
        (
            {"shifts": [(0, 0)]},
            r"shifts must be some that move images of 8x12 under 'circular', got \[\(0, 0\)\], which every",
        ),
        ({"shifts": [(8, -12), (0, 24)]}, r"under 'circular', got \[\(8, -12\), \(0, 24\)\], which"),
        ({"shifts": [(0, 0)], "protocol": "canvas", "fill": 0.0}, "some that move images of 8x12 under 'canvas'"),
        ({"shifts": [(0, 0)], "protocol": "crop", "size": (4, 6)}, "some that move images of 4x6 under 'crop'"),
    ],
)
def test_assertion_refusals(options, match):
    """What only the assertion takes."""
    images = nn.functional.pad(torch.rand(1, 1, 6, 10), (1, 1, 1, 1))
    with pytest.raises(ValueError, match=match):
        assert_shift_equivariant(tokens, images, stride=2, **options)


def test_one_shift_that_moves_the_images_is_enough():
    """Half a period moves them, and so does a full one where nothing wraps around."""
    images = torch.rand(1, 1, 8, 12)
    assert_shift_equivariant(tokens, images, shifts=[(0, 0), (8, 6)], stride=2)
    sprite = nn.functional.pad(images, (6, 6, 4, 4))
    assert_shift_equivariant(tokens, sprite, shifts=[(4, 0)], stride=2, protocol="canvas", fill=0.0)
    larger = torch.rand(1, 1, 32, 48)
    assert_shift_equivariant(tokens, larger, shifts=[(4, 6)], stride=2, protocol="crop", size=(8, 12))


@quick
@given(st.integers(1, 5), st.integers(5, 20), st.booleans(), st.data())
def test_shifts_keep_their_promise(multiple, limit, identity, data):
    """Bounds, multiples, and the identity only if asked for."""
    dy, dx = data.draw(testing.shifts(limit, multiple_of=multiple, identity=identity))
    assert max(abs(dy), abs(dx)) <= limit
    assert dy % multiple == dx % multiple == 0
    assert identity or (dy, dx) != (0, 0)


@quick
@given(st.integers(1, 9), st.integers(1, 40), st.data())
def test_image_sides_keep_their_promise(divisor, smallest, data):
    """Bounds and divisibility."""
    sides = data.draw(testing.image_sides(divisor, smallest=smallest, largest=smallest + divisor))
    for side in sides:
        assert side % divisor == 0
        assert smallest <= side <= smallest + divisor


@quick
@given(testing.images(testing.image_sides(2, largest=8), channels=1, batch=3, dtype=torch.float32))
def test_images_keep_their_promise(images):
    """Shape, dtype and range."""
    assert images.shape[:2] == (3, 1)
    assert images.dtype == torch.float32
    assert float(images.abs().max()) <= 1


def gaps_by_loops(codes):
    """The distance of every code from its nearest neighbour."""
    K = len(codes)
    return [min([math.dist(codes[k], codes[j]) for j in range(K) if j != k], default=math.inf) for k in range(K)]


@given(testing.codebooks(separation=1600.0, dtype=torch.float16, code_dim=(1, 3)))
def test_wide_codebooks_are_finite(codes):
    """Up to the largest separation of their dtype."""
    assert codes.isfinite().all()


@quick
@given(testing.codebooks(separation=0.7, dtype=torch.float32))
def test_codes_are_separated(codebook):
    """By the distance asked for, after rounding to float32, in any dimension from 1 to 8."""
    assert 1 <= codebook.shape[0] <= 16
    assert 1 <= codebook.shape[1] <= 8
    assert min(gaps_by_loops(codebook.double().numpy())) >= 0.7


@quick
@given(testing.codebooks(num_codes=(20, 25), code_dim=(1, 2), dtype=torch.bfloat16))
def test_codes_are_separated_as_far_as_a_dtype_can(codebook):
    """At the most codes that are not refused."""
    assert min(gaps_by_loops(codebook.double().numpy())) >= 0.5


def test_a_range_of_sizes_is_a_pair():
    """One number is no range."""
    with pytest.raises(TypeError, match=r"^num_codes must be a pair of ints \(smallest, largest\), got 16\.$"):
        testing.codebooks(num_codes=16)


@quick
@given(testing.codebooks(), st.floats(0, 0.24), st.sampled_from([torch.float32, torch.float64]), st.data())
def test_margins_are_certified(codebook, margin, dtype, data):
    """The oracle: distances to all bisecting planes in float64; no push up to the margin changes a token."""
    codebook = codebook.to(dtype)
    latents, indices = data.draw(latents_off_boundaries(codebook, margin=margin, grid=(2, 3), batch=2))
    assert latents.shape == (2, codebook.shape[1], 2, 3)
    assert latents.dtype == dtype
    codes = codebook.double().numpy()
    rows = latents.double().movedim(1, -1).reshape(-1, codebook.shape[1]).numpy()
    for z, c in zip(rows, indices.flatten().tolist(), strict=True):
        for j in range(len(codes)):
            if j != c:
                gap = ((z - codes[j]) ** 2).sum() - ((z - codes[c]) ** 2).sum()
                assert gap / (2 * np.linalg.norm(codes[j] - codes[c])) >= margin
    push = numpy_generator().standard_normal(rows.shape)
    push *= 0.999 * margin / np.linalg.norm(push, axis=1, keepdims=True)
    found = nearest_code(torch.from_numpy(rows + push), codebook.double())
    assert torch.equal(found.view(2, 2, 3), indices)


def test_latents_do_not_sit_on_the_codes():
    """The control: the margin is used, not far exceeded; half a step further some token changes."""
    codebook = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    smallest = math.inf

    @settings(deadline=None, max_examples=40, database=None)
    @given(latents_off_boundaries(codebook, margin=0.1, grid=(8, 8)))
    def look(drawn):
        nonlocal smallest
        smallest = min(smallest, float((drawn[0] - 0.5).abs().min()))

    look()
    assert 0.1 <= smallest < 0.13


def test_crowded_codes_are_never_chosen():
    """Only the code that is alone has room for the margin; if none has, it is refused."""
    codebook = torch.tensor([[0.0, 0], [0.1, 0], [9, 9]])

    @quick
    @given(latents_off_boundaries(codebook, margin=1.0))
    def look(drawn):
        assert (drawn[1] == 2).all()

    look()
    with pytest.raises(ValueError, match=r"margin must be below .*, half the distance of the loneliest code"):
        latents_off_boundaries(codebook, margin=7.0)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: testing.shifts(2, multiple_of=3), "limit must be an int >= 3"),
        (lambda: testing.image_sides(4, smallest=9, largest=11), "largest must be an int >= 12"),
        (lambda: testing.codebooks(num_codes=(5, 4)), r"num_codes\[1\] must be an int >= 5"),
        (
            lambda: testing.codebooks(num_codes=(1, 256), code_dim=(1, 4), dtype=torch.bfloat16),
            r"num_codes\[1\] must be at most 25 with code_dim\[0\]=1 in torch.bfloat16, got 256",
        ),
        (lambda: testing.codebooks(separation=-1.0), "separation must be a finite number >= 0"),
        (
            lambda: testing.codebooks(separation=1e5, dtype=torch.float16),
            r"separation must be at most 1.67e\+03 in torch.float16, got 100000.0",
        ),
        (lambda: testing.images((4, 4), channels=0), "channels must be an int >= 1"),
        (lambda: latents_off_boundaries(torch.zeros(1, 1), margin=-1), "margin must be a finite number >= 0"),
    ],
    ids=["shifts", "sides", "codes", "crowded", "separation", "infinite", "channels", "margin"],
)
def test_strategies_refuse_impossible_ranges(build, match):
    """At once, not in the middle of a test."""
    with pytest.raises(ValueError, match=match):
        build()


def test_without_hypothesis_the_judge_still_works(monkeypatch):
    """Only the strategies need it, and say so."""
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "hypothesis":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert_shift_equivariant(lambda x: roll(x, (1, 0)), torch.rand(1, 1, 4, 4), shifts=[(1, 1)])
    with pytest.raises(
        ImportError, match=r"^hypothesis must be installed to draw inputs: pip install 'te_quant\[testing\]'\.$"
    ):
        testing.shifts(3)
