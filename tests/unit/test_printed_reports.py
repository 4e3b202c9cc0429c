"""What a user sees of a report: a short table in a terminal, the same in a notebook, and a useful repr."""

from __future__ import annotations

import builtins
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from te_quant import CodebookUsage, StabilityReport, measure_stability
from te_quant.equivariance import (
    EquivarianceReport,
    audit,
    comparison_table,
    constant_image_probe,
    measure_equivariance,
    plot_shift_maps,
)
from te_quant.stability import Flip, Identity
from te_quant.tables import Tabular
from te_quant.testing import equivariance_error


def measured(protocol: str = "canvas") -> EquivarianceReport:
    """A report with all of its parts."""
    images = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return measure_equivariance(
        lambda x: ((x[:, 0, ::4, ::4] + 1) / 2 * 3).round().long(),
        images,
        stride=4,
        num_codes=4,
        protocol=protocol,  # type: ignore[arg-type]
        reconstruct=lambda x: x * 0.9,
        latents=lambda x: x[:, :, ::4, ::4],
        codebook=torch.linspace(-1, 1, 4)[:, None],
    )


def model() -> nn.Module:
    """Many modules with long names that lose something."""
    torch.manual_seed(0)
    name = "a_rather_long_name_of_a_layer_that_does_not_fit_into_a_column_of_the_table_{}"
    return nn.Sequential(OrderedDict((name.format(n), nn.Conv2d(3, 3, 3, padding=1)) for n in range(20)))


def usage() -> Any:
    """Of a small codebook."""
    counter = CodebookUsage(64)
    counter.update(torch.tensor([1, 1, 2]))
    return counter.compute()


REPORTS: dict[str, Callable[[], Tabular]] = {
    "EquivarianceReport": measured,
    "Agreement": lambda: measured().aligned,
    "ShiftError": lambda: _present(measured().end_to_end_sub_stride),
    "Margin": lambda: _present(measured().margin),
    "Spread": lambda: _present(measured().margin).movement,
    "ReconstructionError": lambda: _present(measured().reconstruction),
    "CodebookUsageReport": usage,
    "AuditReport": lambda: audit(model(), torch.rand(2, 3, 32, 32)),
    "ConstantImageReport": lambda: constant_image_probe(
        nn.Conv2d(1, 1, 3, padding=1), torch.ones(1, 1, 32, 32), stride=4
    ),
    "StabilityReport": lambda: stable(),
    "TransformStability": lambda: stable().transforms["identity"],
    "CycleStability": lambda: stable().transforms["identity"].cycles[0],
    "ImageShare": lambda: stable().transforms["identity"].whole,
    "ShiftDifference": lambda: equivariance_error(nn.Conv2d(1, 1, 3, padding=1), torch.rand(1, 1, 8, 8), (2, 0)),
}


def stable() -> StabilityReport:
    """Two transforms, two cycles."""
    return measure_stability(
        lambda x: (x[:, 0, ::4, ::4] > 0).long(),
        lambda t: (t * 2.0 - 1)[:, None].repeat_interleave(4, 2).repeat_interleave(4, 3),
        torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1,
        transforms=[Identity(), Flip()],
        cycles=2,
    )


def _present(value: Any) -> Any:
    assert value is not None
    return value


@pytest.mark.parametrize("name", REPORTS)
def test_print_gives_a_short_table(name: str) -> None:
    """At most 26 lines of at most 100 characters, with a header and a rule."""
    report = REPORTS[name]()
    assert type(report).__name__ == name
    lines = str(report).splitlines()
    assert len(lines) <= 26
    assert max(map(len, lines)) <= 100
    assert set(lines[1]) == {"-", " "}


@pytest.mark.parametrize("name", REPORTS)
def test_a_notebook_shows_the_same_cells(name: str) -> None:
    """As an HTML table."""
    report = REPORTS[name]()
    html = report._repr_html_()
    assert html.startswith("<table>")
    assert html.count("<tr>") == 1 + len(report.summary().rows)


@pytest.mark.parametrize("name", REPORTS)
def test_repr_names_the_class_and_stays_short(name: str) -> None:
    """The values, without images and without the maps over all shifts."""
    text = repr(REPORTS[name]())
    assert text.startswith(f"{name}(")
    # A report with everything in it, and one row per module, are the longest.
    assert len(text) < (9000 if name == "AuditReport" else 4000)


def test_a_report_prints_its_figures_and_conditions() -> None:
    """Each agreement with κ, and under which conditions it was measured."""
    report = measured()
    text = str(report)
    line = next(line for line in text.splitlines() if line.startswith("aligned (whole tokens)"))
    assert line.split("  ")[-1].strip() == f"{report.aligned.chance:.3f}"
    assert report.aligned.rate_text() in line
    assert report.aligned.kappa_text() in line
    assert "Protocol `canvas`, 3 images, 32x32 pixels, stride 4" in " ".join(text.split())


def test_an_audit_prints_the_worst_modules_and_how_many_more_there_are() -> None:
    """Twelve of twenty convolutions with zero padding."""
    text = str(REPORTS["AuditReport"]())
    assert text.count("Conv2d, pads (zeros)") == 12
    assert "20 of 20 modules add more than rounding. 8 more add less." in " ".join(text.split())


def test_an_audit_without_losses_says_so() -> None:
    """An empty table, and the error of the output below it."""
    convolution = nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular").double()
    text = " ".join(str(audit(convolution, torch.rand(2, 3, 16, 16).double())).split())
    assert "0 of 1 modules add more than rounding. Error after the last module: whole shifts exact." in text


def test_several_reports_print_side_by_side() -> None:
    """Columns that do not fit follow in a block of their own."""
    report = measured()
    text = str(comparison_table({f"model {number}": report for number in range(5)}))
    assert max(map(len, text.splitlines())) <= 100
    assert all(f"model {number}" in text for number in range(5))


@pytest.mark.parametrize(
    "draw",
    [
        lambda: measured().plot(),
        lambda: plot_shift_maps({"a": measured()}),
        lambda: REPORTS["AuditReport"]().plot(),  # type: ignore[attr-defined]
        lambda: REPORTS["ConstantImageReport"]().plot(),  # type: ignore[attr-defined]
    ],
    ids=["report", "maps", "audit", "constant image"],
)
def test_without_matplotlib_the_error_names_the_extra(
    draw: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence with the command to type."""
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        ImportError,
        match=r"^matplotlib must be installed to draw a report: pip install 'te_quant\[plot\]'\.$",
    ):
        draw()
