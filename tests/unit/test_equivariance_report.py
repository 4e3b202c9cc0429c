"""Reports as values: tables, strict JSON, pictures."""

import io
import json
import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
import torch

from te_quant import equivariance
from te_quant.equivariance import (
    AuditReport,
    EquivarianceReport,
    comparison_table,
    measure_equivariance,
    plot_reports,
    plot_shift_maps,
)
from te_quant.stability import StabilityReport


def make_report(*, num_codes: int = 4, full: bool = True, **options) -> EquivarianceReport:
    """Measure a tokenizer of ``num_codes`` random-looking tokens."""
    extra = {
        "reconstruct": lambda x: x * 0.9,
        "latents": lambda x: x[:, :, ::4, ::4],
        "codebook": torch.linspace(-1, 1, num_codes)[:, None],
    }
    return measure_equivariance(
        lambda x: ((x[:, 0, ::4, ::4] + 1) / 2 * (num_codes - 1)).round().long(),
        torch.rand(3, 1, 16, 16) * 2 - 1,
        stride=4,
        num_codes=num_codes,
        **(extra if full else {}),
        **options,
    )


@pytest.mark.parametrize(("num_codes", "full"), [(4, True), (4, False), (1, False)])
def test_strict_json_round_trip(num_codes, full):
    """Through text that any JSON parser reads, NaN and missing parts included."""
    report = make_report(num_codes=num_codes, full=full)
    text = json.dumps(report.to_dict(), allow_nan=False)
    again = EquivarianceReport.from_dict(json.loads(text))
    assert again.to_dict() == report.to_dict()
    assert repr(again) == repr(report)
    assert math.isnan(again.aligned.kappa) == (num_codes == 1)


def test_files_of_reports_are_read(tmp_path):
    """As StabilityReport and AuditReport do; the JSON of the command is such a file."""
    report, path = make_report(), tmp_path / "report.json"
    report.save(path)
    assert repr(EquivarianceReport.load(str(path))) == repr(report)
    path.write_text(json.dumps(report.to_dict(), indent=2))
    assert repr(EquivarianceReport.load(path)) == repr(report)


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("[1]", "got list."),
        ("half", r"got another file \(Expecting value"),
        ("{}", "report must be the values of a saved KIND, got no report: an empty object."),
        ('{"a": 1, "b": 2, "c": 3}', "got no report: an object with 'a', 'b', 'c'[.]"),
        ('{"a": 1, "b": 2, "c": 3, "d": 4}', "no report: an object with 'a', 'b', 'c', [.]{3}[.]"),
        ('{"format": null}', "format must be 2 or 3 .*, got None"),
    ],
)
@pytest.mark.parametrize("kind", [EquivarianceReport, StabilityReport, AuditReport])
def test_files_without_a_report_are_refused(kind, text, got, tmp_path):
    """By their name, and what they hold."""
    path = tmp_path / "report.json"
    path.write_text(text)
    got = got.replace("KIND", kind.__name__)
    got = got if kind is EquivarianceReport else got.replace("2 or 3 .*", "1.*")
    with pytest.raises(ValueError, match=got):
        kind.load(path)


def test_an_interrupted_save_keeps_the_old_report(tmp_path, monkeypatch):
    """And leaves nothing else behind. Without the interruption the file changes, the control."""
    path = tmp_path / "report.json"
    make_report().save(path)
    before, write = path.read_text(), Path.write_text
    report = make_report(full=False)

    def half(target, text, **options):
        write(target, text[: len(text) // 2], **options)
        raise OSError("disk full")

    with monkeypatch.context() as broken:
        broken.setattr(Path, "write_text", half)
        with pytest.raises(OSError, match="disk full"):
            report.save(path)
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]
    report.save(path)
    assert path.read_text() != before


@pytest.mark.parametrize("field", ["aligned", "transforms", "rows"])
@pytest.mark.parametrize("kind", [EquivarianceReport, StabilityReport, AuditReport])
def test_another_kind_of_report_is_named(kind, field):
    """Whatever its format says. Of its own kind the missing fields are named, the control."""
    other = {"aligned": EquivarianceReport, "transforms": StabilityReport, "rows": AuditReport}[field]
    assert field in {one.name for one in fields(other)}
    name = other.__name__
    named = f"report must be of class {kind.__name__}, got one of class {name}; use {name}.load or .from_dict"
    with pytest.raises(ValueError, match="fields must be" if kind is other else named):
        kind.from_dict({"format": 3 if kind is EquivarianceReport else 1, field: []})


def test_infinite_psnr_survives_json():
    """A perfect reconstruction has an infinite PSNR; strict JSON has no infinity."""
    report = make_report()
    report = replace(report, reconstruction=replace(report.reconstruction, psnr=math.inf))
    again = EquivarianceReport.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False)))
    assert again.reconstruction.psnr == math.inf


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda data: data | {"format": 1},
            r"format must be 2 or 3 \(measure again: another format lacks .*, got 1",
        ),
        (lambda data: {k: v for k, v in data.items() if k != "aligned"}, "report fields must be"),
        (lambda data: data | {"surprise": 1}, "report fields must be"),
    ],
    ids=["format", "missing", "unknown"],
)
def test_other_dictionaries_are_refused(change, match):
    """Another format, a missing field, an unknown field."""
    data = make_report().to_dict()
    with pytest.raises(ValueError, match=match):
        EquivarianceReport.from_dict(change(data))


def test_reports_of_the_former_format_are_read():
    """Without intervals of the medians, which then print as a median alone; all else is as it was."""
    report = make_report()
    data = json.loads(json.dumps(report.to_dict()))
    assert data["format"] == 3
    data["format"] = 2
    for name in ("margin", "movement", "ratio"):
        assert len(data["margin"][name].pop("median_interval")) == 2
    again = EquivarianceReport.from_dict(data)
    assert all(math.isnan(bound) for bound in again.margin.margin.median_interval)
    spread = again.margin.margin
    row = cells(again.to_markdown())["margin, median (5 % to 95 %)"]
    assert row == [f"{spread.median:.3g} ({spread.low:.3g} to {spread.high:.3g})"]
    whole = replace(
        again,
        margin=replace(again.margin, **{n: getattr(report.margin, n) for n in ("margin", "movement", "ratio")}),
    )
    assert repr(whole) == repr(report)


def test_code_use_is_stored_as_before():
    """Four figures, as in files of older versions; K and the bound of frequent codes are known without them."""
    report = make_report()
    data = report.to_dict()
    assert list(data["code_use"]) == ["used_codes", "frequent_codes", "perplexity", "tokens"]
    again = EquivarianceReport.from_dict(data)
    assert again.code_use == report.code_use
    assert (again.code_use.num_codes, again.code_use.frequent_share) == (4, 1e-3)


def test_reports_are_frozen():
    """What was measured is not edited by accident."""
    report = make_report(full=False)
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'aligned'"):
        report.aligned = report.placement


def bracket(value: float, interval: tuple[float, float], pattern: str = ".3f") -> str:
    """Write a number as the tables do."""
    if math.isinf(value):
        return "inf"
    low, high = interval
    return format(value, pattern) + ("" if math.isnan(low) else f" [{low:{pattern}}, {high:{pattern}}]")


def cells(table: str) -> dict[str, list[str]]:
    """Read a Markdown table: first column -> the others."""
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) >= 1
    return {row[0]: row[1:] for row in rows}


def test_markdown_shows_every_agreement_with_kappa_code_use_and_reconstruction():
    """The figures in the table are those of the report; eight agreements, all with κ beside them."""
    report = make_report()
    rows = cells(report.to_markdown())
    assert rows["index agreement"] == ["rate", "κ", "chance", "token pairs"]
    for label, agreement in [
        ("placement (paper: 5 places, 10 pairs)", report.placement),
        ("placement, foreground", report.placement_foreground),
        ("aligned (whole tokens)", report.aligned),
        ("aligned, foreground", report.aligned_foreground),
        ("sub-stride (best token shift)", report.sub_stride),
        ("sub-stride, foreground", report.sub_stride_foreground),
        ("sub-stride (Fourier)", report.sub_stride_fourier),
        ("sub-stride (Fourier), foreground", report.sub_stride_fourier_foreground),
    ]:
        rate = bracket(agreement.rate, agreement.rate_interval)
        kappa = bracket(agreement.kappa, agreement.kappa_interval)
        assert rows[label] == [rate, kappa, f"{agreement.chance:.3f}", f"{agreement.tokens:,}"]
    assert report.sub_stride.kappa_interval[0] < report.sub_stride.kappa_interval[1]
    assert rows["error after a shift"] == ["dB, more is better", "mean square"]
    for label, error in [
        ("features, whole tokens", report.feature_error),
        ("features, sub-stride (Fourier)", report.feature_error_sub_stride),
        ("end to end PSNR, whole tokens", report.end_to_end),
        ("end to end PSNR, sub-stride", report.end_to_end_sub_stride),
    ]:
        assert rows[label] == [bracket(error.decibels, error.interval, ".2f"), f"{error.mean_square:.3g}"]
    margin = report.margin
    assert rows["certified rate (moves less than its margin)"] == [
        bracket(margin.certified_rate, margin.certified_interval)
    ]
    for label, spread in [
        ("margin, median (5 % to 95 %)", margin.margin),
        ("movement under whole-token shifts, median (5 % to 95 %)", margin.movement),
        ("movement / margin, median (5 % to 95 %)", margin.ratio),
    ]:
        median = bracket(spread.median, spread.median_interval, ".3g")
        assert rows[label] == [f"{median} ({spread.low:.3g} to {spread.high:.3g})"]
    low, high = margin.margin.median_interval
    assert low <= margin.margin.median <= high
    assert rows["batch of one"] == ["0", f"{report.numerical_floor['batch of one'].tokens}"]
    assert rows["used codes"] == [f"{report.code_use.used_codes} of 4"]
    assert rows["codes above 0.1 % of use"] == [str(report.code_use.frequent_codes)]
    assert rows["perplexity"] == [f"{report.code_use.perplexity:.1f}"]
    error = report.reconstruction
    assert rows["reconstruction L1"] == [bracket(error.l1, error.l1_interval, ".4f")]
    assert rows["reconstruction MSE"] == [bracket(error.mse, error.mse_interval, ".4f")]
    assert rows["reconstruction PSNR (dB)"] == [bracket(error.psnr, error.psnr_interval, ".2f")]
    assert "in brackets 95 % intervals, 1,000 resamples of the images." in report.to_markdown()
    assert "Protocol `canvas`, 3 images, 32x32 pixels, stride 4, K = 4" in report.to_markdown()


def test_markdown_says_what_was_not_measured_and_what_is_undefined():
    """A collapsed tokenizer without decoder: κ undefined, reconstruction not measured."""
    rows = cells(make_report(num_codes=1, full=False).to_markdown())
    assert rows["aligned (whole tokens)"][:3] == ["1.000 [1.000, 1.000]", "undefined", "1.000"]
    assert rows["reconstruction L1"] == ["not measured"]
    for missing in ("sub-stride (Fourier)", "error after a shift", "margin"):
        assert missing not in rows


def test_comparison_shows_conditions_that_differ():
    """Columns side by side; another K or protocol appears as a row, equal conditions as one line."""
    first, second = make_report(), make_report(num_codes=2, full=False)
    table = comparison_table({"A": first, "B|C": second}).to_markdown()
    assert "B\\|C" in table
    rows = cells(table.replace("B\\|C", "B"))
    assert rows["rate (κ)"] == ["A", "B"]
    assert rows["num codes"] == ["4", "2"]
    assert "stride" not in rows
    assert rows["aligned (whole tokens)"] == [
        f"{bracket(r.aligned.rate, r.aligned.rate_interval)} "
        f"(κ {bracket(r.aligned.kappa, r.aligned.kappa_interval)})"
        for r in (first, second)
    ]
    error = first.end_to_end_sub_stride
    assert rows["end to end PSNR, sub-stride (dB)"] == [
        bracket(error.decibels, error.interval, ".2f"),
        "not measured",
    ]
    assert rows["certified rate (moves less than its margin)"] == ["1.000 [1.000, 1.000]", "not measured"]
    floors = [r.numerical_floor["batch of one"].tokens for r in (first, second)]
    assert rows["numerical floor, batch of one: differing"] == [f"0 of {tokens}" for tokens in floors]
    assert rows["sub-stride (Fourier)"][1] == "not measured"
    error = first.reconstruction
    assert rows["reconstruction L1"] == [bracket(error.l1, error.l1_interval, ".4f"), "not measured"]
    assert "Protocol" not in table

    moved = make_report(protocol="circular", shifts=[(4, 0), (0, 4)])
    wrapped = cells(comparison_table({"A": first, "B": moved}).to_markdown())
    assert wrapped["protocol"] == ["canvas", "circular"]
    assert wrapped["image size"] == ["32x32", "16x16"]
    assert wrapped["shifts"][1] == "(4,0) (0,4)"
    assert wrapped["placement (paper: 5 places, 10 pairs)"][1] == "not measured"

    without = comparison_table({"A": second, "B": second}).to_markdown()
    assert "Fourier" not in without
    assert "certified" not in without
    variants = [{"one": 1, "two": 2}, {"two": 2, "half": lambda x: torch.zeros(len(x), 8, 8).long()}]
    floors = cells(
        comparison_table(
            {n: make_report(full=False, variants=v) for n, v in zip("AB", variants, strict=True)}
        ).to_markdown()
    )
    assert floors["numerical floor, one: differing"] == ["0 of 192", "not measured"]
    assert floors["numerical floor, half: differing"][0] == "not measured"
    same = comparison_table({"A": first, "B": make_report()}).to_markdown()
    assert "num codes" not in cells(same)
    assert "Protocol `canvas`" in same


@pytest.mark.parametrize("compare", [comparison_table, plot_reports, plot_shift_maps])
def test_comparison_of_nothing_is_refused(compare):
    """At least one report."""
    with pytest.raises(ValueError, match="reports must be at least one, got 0"):
        compare({})


def test_shift_maps_of_an_unknown_value_are_refused():
    """With the list of those that there are."""
    with pytest.raises(
        ValueError, match="value must be one of 'agreement', 'feature_error', 'end_to_end', got 'κ'"
    ):
        plot_shift_maps({"a": make_report(full=False)}, value="κ")


def texts(figure) -> list[str]:
    """All that is written in a figure."""
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_plot_draws_what_the_report_says():
    """Bars as high as the figures, whiskers as their intervals, the map as the rates by shift."""
    report = make_report()
    figure = report.plot()
    rates, kappas, errors, shift_map = figure.axes
    agreements = list(report.agreements().values())
    assert [bar.get_height() for bar in rates.patches] == [a.rate for a in agreements]
    assert [bar.get_height() for bar in kappas.patches] == [a.kappa for a in agreements]
    for axes, intervals in [
        (rates, [a.rate_interval for a in agreements]),
        (kappas, [a.kappa_interval for a in agreements]),
    ]:
        lines = [collection.get_segments()[0] for collection in axes.collections]
        whiskers = [tuple(line[:, 1].tolist()) for line in lines if line[0, 0] == line[1, 0]]
        assert whiskers == [pytest.approx(interval) for interval in intervals]
    finite = [e.decibels for e in report.errors().values() if math.isfinite(e.decibels)]
    heights = [bar.get_height() for bar in errors.patches]
    assert len(heights) == len(report.errors()) == 4
    assert set(finite) <= set(heights)
    assert "exact" in [text.get_text() for text in errors.texts]
    drawn = shift_map.images[0].get_array()
    assert drawn.mask.sum() == 1
    assert drawn.mask[0, 0]
    for entry in report.sub_stride_by_shift:
        assert drawn[entry.shift] == entry.agreement.rate
    assert shift_map.get_title().startswith("equal indices by sub-stride shift\n")
    assert "perplexity" in shift_map.get_title()
    assert "PSNR" in shift_map.get_title()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=40)
    assert picture.getvalue().startswith(b"\x89PNG")


@pytest.mark.parametrize("value", ["agreement", "feature_error", "end_to_end"])
def test_shift_maps_draw_every_shift(value):
    """Whole-token shifts above, sub-stride shifts below, at the place of their pixels; missing ones grey."""
    report = make_report(shifts=[(4, -4), (0, 8)])
    bare = make_report(full=False, protocol="circular")
    figure = plot_shift_maps({"full": report, "bare": bare}, value=value)
    assert len(figure.axes) == 4
    whole, below = figure.axes[:2]
    assert "whole-token" in whole.get_title()
    assert "sub-stride" in below.get_title()
    assert [text.get_text() for text in whole.get_xticklabels()] == ["-4", "0", "8"]
    assert [text.get_text() for text in whole.get_yticklabels()] == ["0", "4"]

    def figures(entry):
        return entry.agreement.rate if value == "agreement" else getattr(entry, value)

    drawn = whole.images[0].get_array()
    assert drawn.mask.sum() == 6 - 2
    top = whole.images[0].get_clim()[1]
    for entry, place in zip(report.aligned_by_shift, [(1, 0), (0, 2)], strict=True):
        assert drawn[place] == pytest.approx(min(figures(entry), top))
    for entry in report.sub_stride_by_shift:
        assert below.images[0].get_array()[entry.shift] == pytest.approx(min(figures(entry), top))
    assert figure.axes[3].images[0].get_array().mask.sum() == (1 if value == "agreement" else 16)
    assert len({axes.images[0].get_clim() for axes in figure.axes}) == 1
    figure.savefig(io.BytesIO(), format="png", dpi=30)


def test_plot_of_several_reports_marks_what_is_missing():
    """Five reports, one collapsed and one of stride 16: undefined is written, large maps carry no figures."""
    large = measure_equivariance(
        lambda x: torch.zeros(len(x), 2, 2, dtype=torch.int64),
        torch.zeros(1, 1, 32, 32),
        stride=16,
        num_codes=2,
        protocol="circular",
        sub_stride_shifts=[(0, 1), (8, 8)],
    )
    reports = {
        "a": make_report(),
        "b": make_report(),
        "c": make_report(),
        "d": make_report(num_codes=1, full=False),
    }
    figure = plot_reports(reports | {"e": large})
    assert len(figure.axes) == 3 + 5
    assert "undef." in texts(figure)
    assert len(figure.axes[-1].texts) == 0
    assert [entry.get_text() for entry in figure.legends[0].get_texts()] == ["a", "b", "c", "d", "e"]
    assert "reconstruction not measured" in figure.axes[-1].get_title()
    figure.savefig(io.BytesIO(), format="png", dpi=30)


def test_bars_of_many_reports_differ_in_colour_or_hatching():
    """Ten reports, eight colours."""
    report = make_report(full=False)
    (legend,) = plot_reports({f"_{n}": report for n in range(10)}).legends
    # Names that begin with an underscore, which matplotlib would leave out, are there.
    assert [entry.get_text() for entry in legend.get_texts()] == [f"_{n}" for n in range(10)]
    looks = [(bar.get_facecolor(), bar.get_hatch()) for bar in legend.legend_handles]
    assert len(set(looks)) == 10
    assert len({colour for colour, _ in looks}) == 8


def test_importing_and_tabulating_needs_no_matplotlib():
    """Matplotlib is loaded only by a picture."""
    code = "import sys, te_quant.equivariance; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_exists():
    """``__all__`` lists what is there."""
    for name in equivariance.__all__:
        assert hasattr(equivariance, name)
