"""Token stability: exact on constructed tokenizers, and equal to an oracle elsewhere."""

from __future__ import annotations

import copy
import json
import math
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from te_quant import StabilityReport, TokenStability, measure_stability
from te_quant.stability import (
    CropAndPlace,
    EightBit,
    Flip,
    Identity,
    Resize,
    ShiftPixels,
    ShiftTokens,
    Transform,
    plot_stability,
    stability_table,
)
from tests.helpers import exactly
from tests.unit.stability_cases import (
    K,
    Oracle,
    S,
    cell_images,
    decode,
    encode,
    moved,
    permuting,
    planted,
    spoilt,
    tokens_of,
)

# Transforms after which the tokens of a cell-wise tokenizer are where they should be.
EXACT: list[Transform] = [
    Identity(),
    EightBit(),
    ShiftTokens((1, -2)),
    ShiftTokens((0, 1), border="replicate"),
    CropAndPlace(0.5),
    Flip("horizontal"),
    Flip("vertical"),
]
ORACLE: list[Transform] = [
    Identity(),
    ShiftTokens((1, -2)),
    ShiftTokens((0, 1), border="replicate"),
    ShiftPixels((-1, 3)),
    ShiftPixels((3, 0), border="replicate"),
    CropAndPlace(0.5),
    Flip("horizontal"),
    Flip("vertical"),
]


def measured(
    encoder: Callable[[Tensor], Tensor] = encode,
    decoder: Callable[[Tensor], Tensor] = decode,
    count: int = 6,
    **options: Any,
) -> StabilityReport:
    """Measure images that show random tokens."""
    options = {"transforms": [Identity()], "num_codes": K, "resamples": 0, **options}
    return measure_stability(encoder, decoder, cell_images(tokens_of(count)), **options)


@pytest.mark.parametrize("transform", EXACT, ids=lambda transform: transform.name)
def test_a_cell_wise_tokenizer_keeps_all_tokens(transform: Transform) -> None:
    """Under every transform that moves whole cells, in every cycle."""
    report = measured(transforms=[transform], cycles=2, resamples=20)
    for cycle in report.transforms[transform.name].cycles:
        assert cycle.foreground is not None
        for agreement in (cycle.match, cycle.foreground, cycle.step):
            assert agreement.rate == agreement.kappa == 1
            assert agreement.rate_interval == agreement.kappa_interval == (1, 1)
        assert cycle.whole.share == 1
        assert cycle.whole.interval == (1, 1)
    assert report.reconstruction is not None
    assert report.reconstruction.psnr == math.inf or report.reconstruction.psnr > 120


@pytest.mark.parametrize("transform", [ShiftPixels((1, 0)), ShiftPixels((0, 2)), Resize(0.25)])
def test_shifts_below_one_token_do_not_pass(transform: Transform) -> None:
    """Negative control: the same tokenizer, and a transform that mixes cells."""
    found = measured(transforms=[transform]).transforms[transform.name]
    assert found.match.rate < 0.6
    assert found.whole.share == 0


def test_a_planted_flip_gives_its_known_share() -> None:
    """Two tokens of the first image and five of the third: 7 of 120, and four images of six are whole."""
    places = torch.zeros(6, 4, 5, dtype=torch.bool)
    places[0, 1, 2:4] = places[2, 3] = True
    found = measured(decoder=planted(places)).transforms["identity"]
    assert found.match.rate == 1 - 7 / 120
    assert found.match.differing == 7
    assert found.match.tokens == 120
    assert found.whole.share == 4 / 6
    assert found.whole.images == 6


def test_a_permutation_of_codes_gives_kappa_near_zero() -> None:
    """One fixed point of K: the rate is that of chance, and what a collapsed codebook returns is not."""
    order = torch.cat([torch.tensor([0]), torch.roll(torch.arange(1, K), 1)])
    uniform = torch.randint(0, K, (40, 8, 8), generator=torch.Generator().manual_seed(0))
    found = measure_stability(
        encode, permuting(order), cell_images(uniform), transforms=[Identity()], num_codes=K, resamples=0
    ).transforms["identity"]
    assert abs(found.match.rate - 1 / K) < 0.01
    assert abs(found.match.kappa) < 0.02


def test_a_collapsed_codebook_returns_all_tokens_and_has_no_kappa() -> None:
    """A rate of 1 that means nothing is flagged, and the code use stands next to it."""
    report = measured(encoder=lambda images: torch.zeros(len(images), 4, 5, dtype=torch.int64))
    assert report.transforms["identity"].match.rate == 1
    assert not report.transforms["identity"].match.kappa_defined
    assert report.code_use.used_codes == 1
    assert "undefined" in str(report)
    assert "1 of 16 codes used" in str(report)


def oracles(transform: Transform, cycles: int, count: int) -> list[dict[str, Oracle]]:
    """Count position by position what ``spoilt`` returns."""
    name = transform.name
    first = spoilt(cell_images(tokens_of(count)))
    expected, marked = first.numpy(), (cell_images(tokens_of(count))[:, 0, ::S, ::S] > -0.9).numpy()
    valid = np.ones(expected.shape, dtype=bool)
    current = first
    results = []
    for _ in range(cycles):
        images = transform.transform_images(decode(current), stride=S, data_range=(-1.0, 1.0))
        after = spoilt(images)
        found = {kind: Oracle() for kind in ("match", "foreground", "step")}
        following = [np.empty_like(part) for part in (expected, marked, valid)]
        for i in range(count):
            before, here = moved(current[i].numpy(), name)
            following[0][i] = moved(expected[i], name)[0]
            following[1][i] = moved(marked[i].astype(int), name)[0] == 1
            following[2][i] = here & (moved(valid[i].astype(int), name)[0] == 1)
            counts, actual = following[2][i], after[i].numpy()
            found["match"].add(following[0][i], actual, counts)
            found["foreground"].add(following[0][i], actual, counts & following[1][i])
            found["step"].add(before, actual, counts)
        expected, marked, valid = following
        results.append(found)
        current = after
    return results


@pytest.mark.parametrize("transform", ORACLE, ids=lambda transform: transform.name)
def test_every_figure_is_that_of_the_oracle(transform: Transform) -> None:
    """Match, κ, foreground, whole images and the step, of two cycles."""
    cycles = 1 if isinstance(transform, ShiftPixels | CropAndPlace) else 2
    report = measured(spoilt, count=7, transforms=[transform], cycles=cycles, batch_size=3)
    for cycle, oracle in zip(report.transforms[transform.name].cycles, oracles(transform, cycles, 7), strict=True):
        for kind, expected in oracle.items():
            agreement = getattr(cycle, kind)
            assert (agreement.rate, agreement.kappa) == pytest.approx(expected.rate_and_kappa(), abs=1e-12)
            assert agreement.tokens == sum(len(pair[0]) for pair in expected.pairs)
        assert cycle.whole.share == oracle["match"].whole()
    assert 0 < cycle.match.rate < 1


def percentiles(values: list[float]) -> tuple[float, float]:
    """Order statistics, rounded outwards."""
    ordered = sorted(value for value in values if not math.isnan(value))
    last = len(ordered) - 1
    return ordered[math.floor(0.025 * last)], ordered[math.ceil(0.975 * last)]


def test_intervals_are_those_of_a_bootstrap_by_hand() -> None:
    """Whole images are drawn, and every figure is formed again."""
    resamples, count = 60, 7
    report = measured(spoilt, count=count, transforms=[Flip()], resamples=resamples, seed=3, batch_size=2)
    drawn = torch.randint(0, count, (resamples, count), generator=torch.Generator().manual_seed(3)).tolist()
    cycle, (oracle,) = report.transforms["flip horizontal"].cycles[0], oracles(Flip(), 1, count)
    for kind in ("match", "foreground"):
        rates, kappas = zip(*(oracle[kind].rate_and_kappa(images) for images in drawn), strict=True)
        agreement = getattr(cycle, kind)
        assert agreement.rate_interval == pytest.approx(percentiles(list(rates)), abs=1e-12)
        assert agreement.kappa_interval == pytest.approx(percentiles(list(kappas)), abs=1e-12)
    assert cycle.whole.interval == percentiles([oracle["match"].whole(images) for images in drawn])
    other = measured(spoilt, count=count, transforms=[Flip()], resamples=resamples, seed=4)
    assert other.transforms["flip horizontal"].match.kappa_interval != cycle.match.kappa_interval


def test_reconstruction_and_code_use_stand_next_to_it() -> None:
    """The error is that of decode(encode(x)), in the unit of the data range."""
    images = (cell_images(tokens_of(6)) + 1) / 2
    noisy = images + 0.01 * torch.sin(torch.arange(images.numel())).view_as(images)
    unit = {"data_range": (0.0, 1.0), "num_codes": K, "resamples": 0, "transforms": [EightBit()]}
    report = measure_stability(
        lambda x: encode(2 * x - 1), lambda t: (decode(t) + 1) / 2, noisy.clamp(0, 1), **unit
    )
    mse = float((noisy.clamp(0, 1).double() - images.double()).square().mean())
    assert report.reconstruction is not None
    assert report.reconstruction.mse == pytest.approx(mse, rel=1e-6)
    assert report.reconstruction.psnr == pytest.approx(-10 * math.log10(mse), rel=1e-6)
    assert report.code_use.used_codes == len(encode(2 * images - 1).unique())
    assert report.transforms["8-bit"].match.rate == 1


def test_tokens_may_be_given() -> None:
    """The first tokens are then not encoded, and there is nothing to compare decoded images with."""
    tokens = tokens_of(6)
    report = measure_stability(encode, decode, tokens=tokens, transforms=[Identity()], num_codes=K, resamples=0)
    from_images = measured()
    assert report.transforms == from_images.transforms
    assert report.code_use == from_images.code_use
    assert report.reconstruction is None
    assert "6 images of given tokens" in str(report)


def test_without_a_ground_there_is_no_foreground() -> None:
    """One image that shows none is enough, unless the ground is given."""
    tokens = tokens_of(6)
    tokens[2] = tokens[2].clamp_min(1)
    options = {"transforms": [Identity()], "resamples": 0, "batch_size": 2}
    report = measure_stability(encode, decode, cell_images(tokens), **options)
    assert report.transforms["identity"].foreground is None
    assert report.settings.ground is None
    assert "foreground" not in str(report)
    given = measure_stability(encode, decode, cell_images(tokens), ground=-1.0, **options)
    found = given.transforms["identity"].foreground
    assert found is not None
    assert found.tokens == int((tokens > 0).sum())
    assert "foreground" in str(given)
    assert "foreground" in str(measured())


def test_the_number_of_codes_may_be_unknown() -> None:
    """Nothing else changes."""
    known, unknown = measured(spoilt, resamples=20), measured(spoilt, resamples=20, num_codes=None)
    assert unknown.transforms == known.transforms
    assert "16 codes used" in str(unknown)
    assert "16 of 16 codes used" in str(known)


def test_the_announced_passes_are_those_that_run(capsys: pytest.CaptureFixture[str]) -> None:
    """For images and for given tokens."""
    calls = []

    def counting(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: calls.append(len(x)) or function(x)

    options = {"transforms": [Identity(), Flip()], "cycles": 3, "batch_size": 4, "progress": True, "resamples": 0}
    for given in ({"images": cell_images(tokens_of(6))}, {"tokens": tokens_of(6)}):
        calls.clear()
        measure_stability(counting(encode), counting(decode), **given, **options)
        assert capsys.readouterr().err.startswith(f"measure_stability: {len(calls)} passes\n")


# --- the metric


def test_any_split_into_batches_gives_the_same_report() -> None:
    """To the last bit, intervals included."""
    images = cell_images(tokens_of(7))
    metric = TokenStability(K, transforms=[Identity(), Flip()], cycles=2, resamples=20)
    for batch in (images[:1], images[1:1], images[1:5], images[5:]):
        metric.update(spoilt, decode, batch)
    options = {"transforms": [Identity(), Flip()], "cycles": 2, "num_codes": K, "resamples": 20}
    assert metric.compute() == measure_stability(spoilt, decode, images, **options)
    metric.reset()
    metric.update(spoilt, decode, images[:3])
    assert metric.compute() == measure_stability(spoilt, decode, images[:3], **options)


class Holder(nn.Module):
    """A model that measures itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.stability = TokenStability(K, transforms=[Identity()], resamples=5)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.half(),
        lambda model: model.to("meta"),
        lambda model: pickle.loads(pickle.dumps(model)),
        copy.deepcopy,
    ],
)
def test_counts_survive_what_happens_to_the_model(change: Callable[[Holder], Holder]) -> None:
    """Casts, moves and copies; and counting goes on."""
    model = Holder()
    assert set(model.state_dict()) == {"layer.weight", "layer.bias"}
    images = cell_images(tokens_of(6))
    model.stability.update(spoilt, decode, images[:4])
    metric = change(model).stability
    metric.update(spoilt, decode, images[4:])
    expected = measure_stability(spoilt, decode, images, num_codes=K, transforms=[Identity()], resamples=5)
    assert metric.compute() == expected
    assert repr(metric) == "TokenStability(16, cycles=1, transforms=(identity))"


def test_one_process_is_in_step_with_itself() -> None:
    """And the copy counts for itself."""
    metric = TokenStability(K, transforms=[Identity()], resamples=5)
    metric.update(spoilt, decode, cell_images(tokens_of(3)))
    total = metric.synchronized()
    assert total.compute() == metric.compute()
    total.update(spoilt, decode, cell_images(tokens_of(3)))
    assert total.compute().settings.num_images == 6
    assert metric.compute().settings.num_images == 3


def test_a_failed_batch_is_not_counted() -> None:
    """What was refused leaves the metric as it was."""
    metric = TokenStability(K, transforms=[Identity()], resamples=0)
    with pytest.raises(ValueError, match="must be finite"):
        metric.update(encode, lambda tokens: decode(tokens) * math.nan, cell_images(tokens_of(3)))
    with pytest.raises(ValueError, match=exactly("images must be at least one before compute, got 0.")):
        metric.compute()


# --- the report


def test_the_report_survives_json(tmp_path: Path) -> None:
    """With undefined values, and through a file."""
    report = measured(spoilt, transforms=[Identity(), Flip()], cycles=2, resamples=0)
    assert math.isnan(report.transforms["identity"].match.rate_interval[0])
    again = StabilityReport.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False)))
    # NaN is not equal to itself.
    assert repr(again) == repr(report)
    report.save(tmp_path / "report.json")
    assert repr(StabilityReport.load(tmp_path / "report.json")) == repr(report)
    assert str(again) == str(report)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format must be 1 (measure again: another format lacks fields), got 2."),
        ({"more": 1}, "report fields must be ['code_use', 'format', 'reconstruction', 'settings', 'transforms'], got ['code_use', 'format', 'more', 'reconstruction', 'settings', 'transforms']."),  # noqa: E501
    ],
)  # fmt: skip
def test_another_format_is_refused(change: dict[str, object], message: str) -> None:
    """Instead of being read wrongly."""
    with pytest.raises(ValueError, match=exactly(message)):
        StabilityReport.from_dict({**measured().to_dict(), **change})


def test_the_printed_table_fits_a_terminal() -> None:
    """The full one has the intervals and the cycles."""
    report = measured(spoilt, transforms=ORACLE[:3], cycles=2, resamples=20)
    assert max(map(len, str(report).splitlines())) <= 100
    full = report.to_markdown()
    assert full.count("| identity |") == 3
    assert "match, 2 cycles" in full
    single = report.transforms["identity"]
    assert "images whole" in str(single)
    assert "foreground" in str(single.cycles[0])
    assert "share of images" in str(single.whole)


def test_reports_stand_side_by_side() -> None:
    """A transform that one of them lacks is not measured there."""
    reports = {"one": measured(transforms=[Identity(), Flip()]), "two": measured(spoilt)}
    table = stability_table(reports)
    rows = {row[0]: row[1:] for row in table.summary().rows}
    assert rows["identity"][0] == "1.000 (κ 1.000)"
    assert rows["flip horizontal"][1] == "not measured"
    assert rows["used codes"] == ["16 of 16", "16 of 16"]
    assert "[" in stability_table({"one": measured(spoilt, resamples=9)}).to_markdown()
    with pytest.raises(ValueError, match=exactly("reports must be at least one, got 0.")):
        stability_table({})
    with pytest.raises(ValueError, match=exactly("reports must be at least one, got 0.")):
        plot_stability({})


def test_reports_under_other_conditions_say_so() -> None:
    """Each figure is of what its row says: cycles that both have, and the conditions of each report."""
    one = measured(spoilt, cycles=2, transforms=[Identity()], resamples=9)
    two = measured(spoilt, count=3, cycles=4, transforms=[Identity()], num_codes=K + 1)
    table = stability_table({"one": one, "two": two})
    rows = {row[0]: row[1:] for row in table.summary().rows}
    assert rows["num images"] == ["6", "3"]
    assert rows["num codes"] == ["16", "17"]
    assert rows["cycles"] == ["2", "4"]
    assert rows["resamples"] == ["9", "0"]
    assert not {"grid", "image size", "seed"} & rows.keys()
    assert [name for name in rows if "cycles" in name] == ["cycles", "identity, after 2 cycles"]
    second = [report.transforms["identity"].cycles[1].match.rate for report in (one, two)]
    assert rows["identity, after 2 cycles"] == [
        f"{rate:.3f} (κ {report.transforms['identity'].cycles[1].match.kappa:.3f})"
        for rate, report in zip(second, (one, two), strict=True)
    ]
    assert "[" not in str(table)
    assert "images" not in str(table).splitlines()[-1]
    alike = stability_table({"one": one, "again": one})
    assert str(alike).splitlines()[-1].endswith("intervals in to_markdown().")
    assert str(stability_table({"two": two})).splitlines()[-1].endswith("no intervals.")
    assert "in brackets 95 % intervals, 9 resamples" in alike.to_markdown()
    # One that has a single cycle does not hide what the others have.
    rows = {r[0]: r[1:] for r in stability_table({"two": two, "three": measured(spoilt)}).summary().rows}
    assert rows["identity, after 4 cycles"][1] == "not measured"


@pytest.mark.slow
def test_legends_have_every_name() -> None:
    """Also those that begin with an underscore, which matplotlib leaves out, and in the colour of their marks."""
    pytest.importorskip("matplotlib")
    reports = {"_old": measured(spoilt, cycles=2), "new": measured(cycles=4)}
    figure = plot_stability(reports)
    (legend,) = figure.legends
    assert [text.get_text().split(":")[0] for text in legend.get_texts()] == ["_old", "new"]
    colours = [handle.get_color() for handle in legend.legend_handles]
    assert len(set(colours)) == 2
    marks = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 1 and line.get_marker() != "None"]
    assert [mark.get_color() for mark in marks] == colours
    assert figure.axes[-1].get_title().replace("\n", " ") == "tokens that are left after 2 cycles"


@pytest.mark.slow
def test_the_picture_shows_every_figure() -> None:
    """One panel each, and a mark per transform and report."""
    pytest.importorskip("matplotlib")
    report = measured(spoilt, transforms=[Identity(), Flip()], cycles=2, resamples=9)
    figure = report.plot()
    panels = figure.axes
    assert figure.legends[0].get_title().get_text() == "lines: 95 % intervals; vertical line: chance level"
    titles = [panel.get_title().replace("\n", " ") for panel in panels]
    assert titles[0] == "share of tokens that return"
    assert titles[-1] == "tokens that are left after 2 cycles"
    assert len(titles) == 4
    assert [text.get_text() for text in panels[0].get_yticklabels()] == ["identity", "flip horizontal"]
    shown = [text.get_text() for text in panels[0].texts]
    assert shown == [f"{found.match.rate:.2f}" for found in report.transforms.values()]
    bare = measure_stability(encode, decode, IMAGES.clamp_min(-0.5), transforms=[Identity()], resamples=0)
    assert len(plot_stability({"a": bare, "b": bare}).axes) == 2


# --- refusals


IMAGES = cell_images(tokens_of(3))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"images": None}, ValueError, "images or tokens must be given, one of them, got neither."),
        ({"tokens": tokens_of(3)}, ValueError, "images or tokens must be given, one of them, got both."),
        ({"images": IMAGES[0]}, ValueError, "images must be of shape (N, C, H, W), got shape (1, 16, 20)."),
        ({"images": IMAGES[:0]}, ValueError, "images must be at least one, got shape (0, 1, 16, 20)."),
        ({"images": IMAGES.long()}, TypeError, "images must be floating point, got torch.int64."),
        ({"images": IMAGES * 9}, ValueError, "images must be in data_range=(-1, 1), got values from -9 to 9; pass data_range=(low, high) of your images, such as (0, 1)."),  # noqa: E501
        ({"images": None, "tokens": tokens_of(3).float()}, TypeError, "tokens must be an integer tensor, got torch.float32."),  # noqa: E501
        ({"images": None, "tokens": tokens_of(3) + K}, ValueError, "tokens must be in [0, num_codes=16), got 31."),
        ({"encode": lambda x: encode(x).float()}, TypeError, "encode(images) must be an integer tensor, got torch.float32."),  # noqa: E501
        ({"encode": lambda x: encode(x)[..., None]}, ValueError, "encode(images) must be of shape (B, h, w), one index per token, got shape (3, 4, 5, 1)."),  # noqa: E501
        ({"encode": lambda x: encode(x) + K}, ValueError, "encode(images) must be in [0, num_codes=16), got 31."),
        ({"encode": lambda x: encode(x)[:, :3]}, ValueError, "encode(images) must be one token per square of 16x20 pixels, got a grid of 3x5."),  # noqa: E501
        ({"decode": lambda t: decode(t)[..., 1:]}, ValueError, "decode(indices) must be of shape (3, 1, 16, 20), got shape (3, 1, 16, 19)."),  # noqa: E501
        ({"decode": lambda t: decode(t).long()}, TypeError, "decode(indices) must be floating point, got torch.int64."),  # noqa: E501
        ({"cycles": 0}, ValueError, "cycles must be an int >= 1, got 0."),
        ({"batch_size": 0}, ValueError, "batch_size must be an int >= 1, got 0."),
        ({"progress": 1}, TypeError, "progress must be True, False or None, got 1."),
        ({"transforms": []}, ValueError, "transforms must be at least one, got 0."),
        ({"transforms": "identity"}, TypeError, "transforms must be a list or tuple of transforms, got 'identity'."),  # noqa: E501
        ({"transforms": [Flip(), Flip()]}, ValueError, "transforms must be of different names, got several called 'flip horizontal'."),  # noqa: E501
        ({"transforms": [lambda x: x]}, TypeError, None),
        ({"transforms": [ShiftTokens((1, 0), "replicate")], "cycles": 4}, ValueError, "valid_tokens of 'shift (1, 0) tokens, replicate' must be True for some token after 4 cycles, got none."),  # noqa: E501
    ],
)  # fmt: skip
def test_refusals(arguments: dict[str, Any], error: type[Exception], message: str | None) -> None:
    """Each has its own sentence."""
    options = {"encode": encode, "decode": decode, "images": IMAGES, "num_codes": K, "resamples": 0, **arguments}
    options.setdefault("transforms", [Identity()])
    pattern = r"^transforms\[0\] must be a te_quant" if message is None else exactly(message)
    with pytest.raises(error, match=pattern):
        measure_stability(**options)


def test_an_encoder_that_draws_random_numbers_is_refused() -> None:
    """Its stability would be that of its randomness."""
    generator = torch.Generator().manual_seed(0)

    def random(images: Tensor) -> Tensor:
        return torch.randint(0, K, (len(images), 4, 5), generator=generator)

    message = (
        r"^encode must be the same for the same images; call model\.eval\(\) first, got other indices for \d+ of"
    )
    with pytest.raises(ValueError, match=message):
        measured(random)
    with pytest.raises(ValueError, match=message):
        measure_stability(random, decode, tokens=tokens_of(3), transforms=[Identity()])


def test_images_that_look_like_another_range_are_warned_of() -> None:
    """Rounding to 8 bits and the PSNR would be wrong silently."""
    with pytest.warns(UserWarning, match=r"Pass data_range=\(0, 1\)"):
        measure_stability(encode, decode, (IMAGES + 1) / 2, transforms=[Identity()])


def test_batches_of_another_size_are_refused() -> None:
    """One report has one size."""
    metric = TokenStability(K, transforms=[Identity()], resamples=0)
    metric.update(encode, decode, IMAGES)
    message = (
        "batches must be of one kind and size, 16x20 pixels, 4x5 tokens from images, "
        "got 16x12 pixels, 4x3 tokens from images."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        metric.update(encode, decode, IMAGES[..., :12])


class Own(Transform):
    """A transform whose parts are given."""

    name = "own"

    def __init__(self, images: Any = None, tokens: Any = None, mask: Any = None) -> None:
        self.parts = images, tokens, mask

    def transform_images(self, images: Tensor, *, stride: int, data_range: tuple[float, float]) -> Tensor:
        """Give the images."""
        return images if self.parts[0] is None else self.parts[0](images)

    def move_tokens(self, tokens: Tensor, *, stride: int) -> Tensor:
        """Give the tokens."""
        return tokens if self.parts[1] is None else self.parts[1](tokens)

    def valid_tokens(self, grid: tuple[int, int], *, stride: int) -> Tensor:
        """Give the mask."""
        return torch.ones(grid, dtype=torch.bool) if self.parts[2] is None else self.parts[2](grid)


@pytest.mark.parametrize(
    ("transform", "error", "message"),
    [
        (Own(mask=lambda grid: torch.ones(grid, dtype=torch.int64)), TypeError, "valid_tokens of 'own' must be bool, got torch.int64; return mask.bool()."),  # noqa: E501
        (Own(mask=lambda _: torch.ones(2, 2, dtype=torch.bool)), ValueError, "valid_tokens of 'own' must be of shape (4, 5), got shape (2, 2)."),  # noqa: E501
        (Own(mask=lambda grid: torch.zeros(grid, dtype=torch.bool)), ValueError, "valid_tokens of 'own' must be True for at least one token of a 4x5 grid, got none; pass transforms= without it, or larger images."),  # noqa: E501
        (Own(tokens=lambda tokens: tokens[:, 1:]), ValueError, "move_tokens of 'own' must be of shape (3, 4, 5) and torch.int64, got torch.int64 of shape (3, 3, 5)."),  # noqa: E501
        (Own(images=lambda images: images[..., 1:]), ValueError, "transform_images of 'own' must be of shape (3, 1, 16, 20), got shape (3, 1, 16, 19)."),  # noqa: E501
    ],
)  # fmt: skip
def test_wrong_transforms_are_refused(transform: Transform, error: type[Exception], message: str) -> None:
    """A transform of one's own is checked before anything is counted."""
    with pytest.raises(error, match=exactly(message)):
        measure_stability(encode, decode, IMAGES, transforms=[transform], resamples=0)


def test_a_transform_of_your_own() -> None:
    """Its action and its mask are used: tokens of the left half swap rows, and only they count."""
    left = torch.zeros(4, 5, dtype=torch.bool)
    left[:, :2] = True
    own = Own(lambda x: x.flip(-2), lambda t: t.flip(-2), lambda _: left)
    found = measure_stability(encode, decode, IMAGES, transforms=[own], resamples=0).transforms["own"]
    assert found.match.rate == 1
    assert found.match.tokens == 3 * 8
    wrong = Own(lambda x: x.flip(-2), None, lambda _: left)
    assert measure_stability(encode, decode, IMAGES, transforms=[wrong]).transforms["own"].match.rate < 1


def test_the_default_needs_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """And says what to install, and how to do without."""
    monkeypatch.setitem(sys.modules, "PIL", None)
    message = "Pillow must be installed for JPEG: pip install 'te_quant[jpeg]', or pass transforms without JPEG."
    with pytest.raises(ImportError, match=exactly(message)):
        measure_stability(encode, decode, IMAGES)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_collection_keeps_metrics_of_different_transforms_apart() -> None:
    """Even where the first batch cannot tell them apart; it updates metrics of one transform together."""
    torchmetrics = pytest.importorskip("torchmetrics")
    from te_quant.integrations.torchmetrics import TokenMatch, WholeImages

    kinds = {
        "identity": lambda: TokenMatch(K),
        "flip": lambda: TokenMatch(K, transform=Flip()),
        "whole": lambda: WholeImages(K, transform=Flip()),
    }
    collection = torchmetrics.MetricCollection({name: kind() for name, kind in kinds.items()})
    alone = {name: kind() for name, kind in kinds.items()}
    blank = cell_images(torch.zeros_like(tokens_of(3)))
    for images in (blank, cell_images(tokens_of(3))):
        collection.update(spoilt, decode, images)
        for metric in alone.values():
            metric.update(spoilt, decode, images)
    expected = {name: float(metric.compute()) for name, metric in alone.items()}
    assert {name: float(value) for name, value in collection.compute().items()} == expected
    assert sorted(map(sorted, collection.compute_groups.values())) == [["flip", "whole"], ["identity"]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchmetrics_find_the_same() -> None:
    """One batch and all of them, whatever they are cast to, and anew after a reset."""
    pytest.importorskip("torchmetrics")
    from te_quant.integrations.torchmetrics import TokenMatch, TokenMatchKappa, WholeImages

    images = cell_images(tokens_of(7))
    expected = {}
    for stop in (3, 7):
        report = measure_stability(spoilt, decode, images[:stop], num_codes=K, transforms=[Flip()], resamples=0)
        found = report.transforms["flip horizontal"]
        expected[stop] = (found.match.rate, found.match.kappa, found.whole.share)
    for position, kind in enumerate((TokenMatch, TokenMatchKappa, WholeImages)):
        metric = kind(K, transform=Flip())
        # So that several processes count together.
        reductions = {name: reduction.__name__ for name, reduction in metric._reductions.items()}
        assert {one for name, one in reductions.items() if name != "kind"} == {"dim_zero_sum"}
        assert reductions["kind"] == "dim_zero_max"
        assert metric(spoilt, decode, images[:3]).item() == pytest.approx(expected[3][position], rel=1e-6)
        metric.update(spoilt, decode, images[3:])
        for moved_metric in (metric, copy.deepcopy(metric).half(), copy.deepcopy(metric).set_dtype(torch.half)):
            assert moved_metric.compute().item() == pytest.approx(expected[7][position], rel=1e-6)
        metric.reset()
        metric.update(spoilt, decode, images[:3])
        assert metric.compute().item() == pytest.approx(expected[3][position], rel=1e-6)
        with pytest.raises(ValueError, match=exactly("encode(images) must be in [0, num_codes=16), got 31.")):
            metric.update(lambda x: encode(x) + K, decode, images)
        with pytest.raises(TypeError, match=r"^transform must be a te_quant\.stability\.Transform, got 'flip'\.$"):
            kind(K, transform="flip")  # type: ignore[arg-type]
