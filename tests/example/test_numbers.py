"""Numbers in prose: the language of their markers, finding and rewriting them, and the pages themselves."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from examples.te_vqgan.__main__ import main
from examples.te_vqgan.reports.generation.paper import TABLE1, TABLE2, TABLE3
from examples.te_vqgan.reports.inference import paired_t, welch
from examples.te_vqgan.reports.numbers.data import DATA, ROOT, Results, confirmatory
from examples.te_vqgan.reports.numbers.expressions import evaluate
from examples.te_vqgan.reports.numbers.pages import (
    Marked,
    marked_numbers,
    published_pages,
    rewritten,
    unmarked_decimals,
)
from examples.te_vqgan.reports.numbers.values import Json, Sample, Spread, mean
from tests.helpers import exactly
from tests.published import published

FIRST, SECOND = [0.5, 0.7, 0.9], [0.4, 0.7, 0.7]


def _generation(rates: dict[str, float]) -> dict[str, Any]:
    cases = {
        case: {"digits": digits, "digits_right": round(digits * rates.get(case, 0.5))}
        for case, digits in (("quad1", 100), ("quad2", 200), ("quad3", 300), ("quad4", 400), ("centre", 100))
    }
    return {"held_out": {"text_to_image": {"cases": cases}}, "seen": {"text_to_image": {"cases": cases}}}


def _run(arm: str, seed: int, rate: float) -> dict[str, Any]:
    part = {
        "rules": {
            "tenth": _generation({"quad1": rate}),
            "2": _generation({"quad1": 1.0}),
            "paper": _generation({"quad1": 0.25}),
        },
    }
    small = {"rules": {"tenth": _generation({"quad1": rate - 0.1})}}
    return {
        "arm": arm,
        "seed": seed,
        "evaluation": {"test": {"l1": rate / 10, "psnr": 30.0}, "list": [1, 2]},
        "stage2": {"300": part, "100": small},
    }


DATA_OF_TESTS = {
    "runs": [_run("vqgan", seed, rate) for seed, rate in enumerate(FIRST)]
    + [_run("te_vqgan", seed, rate) for seed, rate in enumerate(SECOND)]
    + [_run("k16", 0, 0.5)],
    "classifier": {"evaluation": {"test": {"digit_accuracy": 0.9935}}},
    "other": {"fashion": {"runs": [_run("vqgan", 0, 0.3)]}},
    "note": "text",
}
RESULTS = Results(DATA_OF_TESTS)
_NAMES = "name must be one of 'vqgan', 'te_vqgan', 'k16', 'runs', 'classifier', 'other', 'note'"
DIFFERENCES = [first - second for first, second in zip(FIRST, SECOND, strict=True)]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("2 * 3 - 1 / 4", 5.75),
        ("-(1 + 2)", -3),
        ("vqgan.t2i.quad1", statistics.fmean(FIRST)),
        ("mean(vqgan.t2i.quad1)", statistics.fmean(FIRST)),
        ("sd(vqgan.t2i.quad1)", statistics.stdev(FIRST)),
        ("se(vqgan.t2i.quad1)", statistics.stdev(FIRST) / math.sqrt(3)),
        ("min(vqgan.t2i.quad1)", 0.5),
        ("max(vqgan.t2i.quad1) - min(vqgan.t2i.quad1)", 0.4),
        ("max(1, 3, 2)", 3),
        ("count(vqgan.t2i.quad1)", 3),
        ("vqgan.t2i.quad1[2]", 0.9),
        ("vqgan.t2i.quads", statistics.fmean((100 * rate + 450) / 1000 for rate in FIRST)),
        ("vqgan.t2i.centre", 0.5),
        ("vqgan.t2i(images=100).quad1", statistics.fmean(FIRST) - 0.1),
        ("vqgan.t2i(rule=2).quad1", 1),
        ("vqgan.t2i(rule=paper).quad1", 0.25),
        ("vqgan.t2i(rule=tenth, split=seen).quad1", statistics.fmean(FIRST)),
        ("vqgan.t2i.quad1 - te_vqgan.t2i.quad1", statistics.fmean(DIFFERENCES)),
        ("se(vqgan.t2i.quad1 - te_vqgan.t2i.quad1)", statistics.stdev(DIFFERENCES) / math.sqrt(3)),
        ("paired_p(vqgan.t2i.quad1 - te_vqgan.t2i.quad1)", paired_t(DIFFERENCES).p),
        ("paired_t(vqgan.t2i.quad1 - te_vqgan.t2i.quad1)", paired_t(DIFFERENCES).statistic),
        ("welch_p(vqgan.t2i.quad1, te_vqgan.t2i.quad1)", welch(FIRST, SECOND).p),
        ("welch_t(vqgan.t2i.quad1, te_vqgan.t2i.quad1)", welch(FIRST, SECOND).statistic),
        ("welch_se(vqgan.t2i.quad1, te_vqgan.t2i.quad1)", welch(FIRST, SECOND).error),
        ("1 - vqgan.t2i.quad1 / 2", 1 - statistics.fmean(FIRST) / 2),
        ("2 * vqgan.t2i.quad1", 2 * statistics.fmean(FIRST)),
        ("abs(te_vqgan.t2i.quad1 - vqgan.t2i.quad1)", statistics.fmean(DIFFERENCES)),
        ("geometric_mean(2, 8)", 4),
        ("geometric_mean(k16.t2i.quad1)", 0.5),
        ("vqgan.l1", statistics.fmean(FIRST) / 10),
        ("vqgan.evaluation.test.psnr", 30),
        ("vqgan.evaluation.list[1]", 2),
        ("vqgan[1].evaluation.test.l1", 0.07),
        ('other["fashion"].vqgan.t2i.quad1', 0.3),
        ("classifier.evaluation.test.digit_accuracy", 0.9935),
    ],
)
def test_expressions(expression: str, expected: float) -> None:
    """Numbers by their formulas, over the seeds of made-up results."""
    assert mean(evaluate(expression, RESULTS)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("expression", "told"),
    [
        ("import os", "expression must be names, numbers, + - * / and calls, got 'import os'."),
        ("__import__('os')", "function must be one of 'mean', 'sd', 'se', 'count', "),
        ("vqgan.__import__('os')", "expression must be names, numbers, + - * / and calls, got "),
        ("vqgan.__class__", "name must be one of 't2i', 'i2t', 'read', 'kappa', 'l1', "),
        ("mean.__globals__", f"{_NAMES}, got 'mean'."),
        ("vqgam.l1", f"{_NAMES}, got 'vqgam'."),
        ("middle(vqgan.l1)", "function must be one of 'mean', 'sd', 'se', 'count', "),
        (
            "vqgan.t2i.quad5",
            "case must be one of 'quads', 'quad1', 'quad2', 'quad3', 'quad4', 'centre', got 'quad5'.",
        ),
        ("vqgan.used", "expression must be one that has a value, got 'vqgan.used' (no 'used_codes')."),
        ("vqgan.evaluation.list[2]", "key must be an index below 2, got 2."),
        ("vqgan.evaluation.list.psnr", "key must be an index below 2, got 'psnr'."),
        ("vqgan[1].evaluation[0]", "key must be one of 'test', 'list', got 0."),
        ("(lambda: 1)()", "expression must be names, numbers, + - * / and calls, got '(lambda: 1)()'."),
        ("[1 for x in y]", "expression must be names, numbers, + - * / and calls, got '[1 for x in y]'."),
        ("2 ** 9", "expression must be names, numbers, + - * / and calls, got '2 ** 9'."),
        ("'text'", "expression must be names, numbers, + - * / and calls, got \"'text'\"."),
        ("True", "expression must be names, numbers, + - * / and calls, got 'True'."),
        ("vqgan.t2i", "expression must end in a number or in a sample over seeds, got a place in the data."),
        ("note", "entry must be a number, an object or a list, got 'text'."),
        ("vqgan.t2i(size=3).quad1", "option must be one of 'images', 'rule', 'split', got 'size'."),
        ("vqgan.t2i(rule=-1).quad1", "option must be a name or a number, got '-1'."),
        ("vqgan.t2i(rule=16).quad1", "sample must be the values of at least one seed, got none."),
        ("vqgan(rule=2)", "options must be none, as this place takes none, got rule."),
        ("vqgan.evaluation(rule=2)", "options must be none, as this place takes none, got rule."),
        ("vqgan.t2i.quad1[7]", "seed must be one of 0, 1, 2, got 7."),
        ("vqgan[7]", "seed must be one of 0, 1, 2, got 7."),
        ("vqgan.t2i.quad1.psnr", "name must be none, as this place has no names, got 'psnr'."),
        ("vqgan.t2i[0]", "key must be none, as this place has no keys, got 0."),
        ("vqgan.evaluation.nothing", "key must be one of 'test', 'list', got 'nothing'."),
        ("vqgan.kappa.l1", "agreement must be one of "),
        ('other["mnist"]', "data set must be one of 'fashion', got 'mnist'."),
        ("vqgan.t2i.quad1 - k16.t2i.quad1", "seeds must be the same in both samples, got 0, 1, 2 and 0."),
        ("sd(k16.t2i.quad1)", "argument must be a sample over at least two seeds, got one seed."),
        ("se(3)", "argument must be a sample over seeds, got a number."),
        ("1 / 0", "expression must be one that has a value, got '1 / 0' (float division by zero)."),
        ("mean(1, 2)", "expression must be one that has a value, got 'mean(1, 2)' ("),
        ("(1).x", "1 must have parts, got the number 1."),
    ],
)
def test_other_expressions_are_refused(expression: str, told: str) -> None:
    """Nothing is run, and every mistake is named."""
    with pytest.raises(ValueError, match="^" + re.escape(told)):
        mean(evaluate(expression, RESULTS))


PAGE = """\
Before<!-- a comment --> it is 0.700<!-- t: vqgan.t2i.quad1 --> or
0.70 ±
0.20<!-- t: vqgan.t2i.quad1 -->, by 0.0 ± 0.12<!-- t: with_se(vqgan.t2i.quad1 - te_vqgan.t2i.quad1) -->;
reads 98.0 %<!-- t: classifier.evaluation.test.digit_accuracy --> and -1<!-- t: -1.4 --> and +0.5<!-- t: 1/2 -->;
**1,200**<!-- other --> and 12,346<!-- t: 12345.6 --> and −0.25<!-- t: 0 - 1/4 -->.
"""
NAMES = {"t": lambda: RESULTS}


def test_markers_give_the_current_number_at_the_printed_precision() -> None:
    """Means, spreads, percentages, signs, commas; a number that is wrong shows both."""
    found = marked_numbers(PAGE, NAMES)
    pairs = [(one.line, one.printed, one.current) for one in found]
    assert pairs == [
        (1, "0.700", "0.700"),
        (2, "0.70 ±\n0.20", "0.70 ±\n0.20"),
        (3, "0.0 ± 0.12", "0.1 ± 0.06"),
        (4, "98.0", "99.4"),
        (4, "-1", "-1"),
        (4, "+0.5", "+0.5"),
        (5, "12,346", "12,346"),
        (5, "−0.25", "−0.25"),
    ]
    assert found[2].marker == "t: with_se(vqgan.t2i.quad1 - te_vqgan.t2i.quad1)"


def test_rewriting_changes_only_the_numbers() -> None:
    """Afterwards all agree, and another pass changes nothing."""
    page = rewritten(PAGE, NAMES)
    assert page == PAGE.replace("0.0 ± 0.12", "0.1 ± 0.06").replace("98.0 %", "99.4 %")
    assert rewritten(page, NAMES) == page
    assert all(one.printed == one.current for one in marked_numbers(page, NAMES))


@pytest.mark.parametrize(
    ("number", "value", "expected"),
    [
        ("0.10", "0.0949", "0.09"),
        ("-0.10", "0.2", "0.20"),
        ("0.10", "-0.2", "-0.20"),
        ("+0.10", "-0.2", "-0.20"),
        ("-0.0", "-0.01", "0.0"),
        ("999", "1000", "1,000"),
        ("1,234.5", "1000", "1,000.0"),
        ("10 ± 2", "Spread", "3 ± 1"),
    ],
)
def test_numbers_are_written_as_they_were(number: str, value: str, expected: str) -> None:
    """With as many decimals, and a minus wherever the value has one."""
    names = {"t": lambda: Results({"runs": []}), "s": lambda: _Fixed(Spread(3.2, 0.8))}
    marker = "s: value" if value == "Spread" else f"t: {value}"
    assert rewritten(f"{number}<!-- {marker} -->", names) == f"{expected}<!-- {marker} -->"


class _Fixed(Json):
    def __init__(self, value: Spread) -> None:
        super().__init__({})
        self.value = value

    def get(self, name: str) -> Spread:
        return self.value


@pytest.mark.parametrize(
    ("page", "told"),
    [
        ("\n0.5 <!-- t: 1/2 -->", "line 2: marker must stand right behind a number, got <!-- t: 1/2 -->."),
        ("half<!-- t: 1/2 -->", "line 1: marker must stand right behind a number, got <!-- t: 1/2 -->."),
        ("0.5<!-- u: 1/2 -->", "line 1: data must be one of t, got 'u'."),
        ("0.5<!-- t: ohno -->", f"line 1: {_NAMES}, got 'ohno'."),
        ("1 ± 2<!-- t: 1/2 -->", "line 1: number behind ± must belong to a sample or a spread, got a number."),
    ],
)
def test_a_marker_without_a_number_or_a_value_is_refused(page: str, told: str) -> None:
    """With its line; a table that is copied from a report is no marker."""
    with pytest.raises(ValueError, match=exactly(told)):
        marked_numbers(page, NAMES)
    assert marked_numbers("<!-- table: small.md\n-->\n| 0.5 |\n<!-- /table -->", NAMES) == []


def test_decimals_without_a_marker_are_found() -> None:
    """In prose and in tables that were typed; not in code, links, comments or tables that are copied."""
    page = """\
1.5 is bare, 2.5<!-- t: 5/2 --> is not, `3.5` is code, [4](https://x/5.5) and https://x/2112.6 lead elsewhere.
```sh
6.5
```
<!-- 7.5 --> torch 2.13.0 is no decimal, nor is 2,000.
<!-- table: small.md
columns: 8.5 -->
| 9.5 |
<!-- /table -->
| (10.5) | 11.5 ± 12.5<!-- t: vqgan.t2i.quad1 --> |
"""
    assert unmarked_decimals(page) == [(1, "1.5"), (10, "10.5")]


def test_the_papers_numbers_are_those_of_its_tables() -> None:
    """Every cell has a name."""
    paper = DATA["paper"]()
    for arm, tasks in TABLE1.items():
        for name, task in (("t2i", "text_to_image"), ("i2t", "image_to_text")):
            for number, cell in enumerate(tasks[task], 1):
                found = evaluate(f"{arm}.{name}.quad{number}", paper)
                assert isinstance(found, Spread)
                assert (found.mean, found.spread) == cell
    assert mean(evaluate("vqgan.t2i(images=100000).quad1", paper)) == TABLE2[100_000]["vqgan"].mean
    assert (
        mean(evaluate('table3["fashion-mnist"].te_vqgan.codes', paper))
        == TABLE3["fashion-mnist"]["te_vqgan"].codes
    )
    with pytest.raises(
        ValueError, match=exactly("name must be one of 'quad1', 'quad2', 'quad3', 'quad4', got 'x'.")
    ):
        evaluate("vqgan.t2i.x", paper)


@pytest.mark.parametrize(
    ("expression", "told"),
    [
        ("cell(weight=1).trip.match", "name must be one of 'cells', got 'cell'."),
        ("cells(size=1).trip.match", "option must be one of 'weight', 'seed', 'trip', "),
        (
            "cells(weight=7, seed=0).trip.match",
            "options must be those of at least one cell, got weight=7, seed=0.",
        ),
        ("cells(weight=1).trips", "name must be one of 'weight', 'seed', 'trip', "),
    ],
)
def test_other_cells_are_refused(expression: str, told: str) -> None:
    """By what there is."""
    published("round-trips/round-trips.json")
    with pytest.raises(ValueError, match="^" + re.escape(told)):
        evaluate(expression, DATA["trips"]())


def test_confirmatory_tests_have_names() -> None:
    """Family, hypothesis, place among its comparisons, field."""
    comparisons = [
        {"hypothesis": name, "mean": mean, "interval": [mean - 1, mean + 1]}
        for name, mean in (("H1", 0.5), ("H3", 0.25), ("H3", 0.75))
    ]
    place = confirmatory({"rules": {"paper": {"family": "primary", "comparisons": comparisons}}})
    assert evaluate("primary.H1[0].mean", place) == 0.5
    assert evaluate("primary.H3[1].mean", place) == 0.75
    assert evaluate("primary.H3[0].interval[1]", place) == 1.25


def test_published_agreements_and_readings_have_names() -> None:
    """Against the JSON itself."""
    runs = json.loads(published("small/results.json").read_text(encoding="utf-8"))["runs"]
    small = DATA["small"]()
    first = next(run for run in runs if (run["arm"], run["seed"]) == ("vqgan", 0))
    found = evaluate("vqgan.kappa.placement", small)
    assert isinstance(found, Sample)
    assert found.values[0] == first["evaluation"]["equivariance"]["placement"]["kappa"]
    rate = evaluate("vqgan.placement[0]", small)
    assert rate == first["evaluation"]["equivariance"]["placement"]["rate"]
    cases = first["reading"]["reconstruction"]["cases"].values()
    read = sum(case["digits_right"] for case in cases) / sum(case["digits"] for case in cases)
    assert evaluate("vqgan.read[0]", small) == pytest.approx(read)


def test_the_command_shows_and_corrects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong number is an error until it is written anew."""
    page = tmp_path / "page.md"
    page.write_text("It is 0.5<!-- paper: te_vqgan.t2i.quad1 -->.\n")
    assert main(["numbers", str(page)]) == 1
    told = capsys.readouterr()
    assert f"{page}:1: 0.5 -> 0.9  (paper: te_vqgan.t2i.quad1)" in told.out
    assert "marked numbers must be those of the data, got 1 others; --write corrects them." in told.err
    assert main(["numbers", str(page), "--write"]) == 0
    assert page.read_text() == "It is 0.9<!-- paper: te_vqgan.t2i.quad1 -->.\n"
    capsys.readouterr()
    assert main(["numbers", str(page)]) == 0
    assert f"{page}:1: 0.9  (paper" in capsys.readouterr().out
    page.write_text("<!-- paper: te_vqgan.t2i.quad1 -->\n")
    assert main(["numbers", str(page)]) == 1
    assert f"error: {page}, line 1: marker must stand right behind a number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "told"),
    [("missing.md", "none at {page}."), ("folder", "the folder {page}."), ("bytes.md", "{page} ('utf-8' codec ")],
)
def test_what_is_no_page_is_refused(
    name: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the name of the argument, and what it must be."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes.md").write_bytes(b"\xff")
    page = tmp_path / name
    assert main(["numbers", str(page)]) == 1
    expected = f"error: pages must be Markdown files in UTF-8, got {told.format(page=page)}"
    assert capsys.readouterr().err.startswith(expected)


def _marked(page: Path) -> list[Marked]:
    # A source distribution has no results.
    for name in (
        "small",
        "small-fine",
        "confirmatory",
        "attempts",
        "best",
        "narrow",
        "exploratory",
        "family",
        "photos",
    ):
        published(f"{name}/results.json")
    return marked_numbers(page.read_text(encoding="utf-8"))


PAGES = published_pages()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_marked_numbers_of_our_pages_are_those_of_the_data(page: Path) -> None:
    """Corrected by ``python -m examples.te_vqgan numbers --write``."""
    assert [one for one in _marked(page) if one.printed != one.current] == []


def _verdict_rows() -> list[tuple[str, str]]:
    """What was measured, and the verdict, in the table of claims."""
    page = ROOT / "docs/reference/results/paper.md"
    rows = [
        line.strip("| ").split(" | ") for line in page.read_text(encoding="utf-8").splitlines() if "| " in line
    ]
    return [(measured, verdict) for _, measured, verdict, _ in (row for row in rows if len(row) == 4)]


# Of a preregistered hypothesis, under the primary rule or under the other one.
_JUDGED = re.compile(r"(with two candidates )?(H\d) (confirmed|contradicted|not resolved)")


def test_verdicts_on_hypotheses_are_those_of_the_tests() -> None:
    """Of every hypothesis, each under both rules."""
    rules = json.loads(published("confirmatory/hypotheses.json").read_text(encoding="utf-8"))["rules"]
    said: dict[str, dict[str, str]] = {"primary": {}, "secondary": {}}
    for _, verdict in _verdict_rows():
        for secondary, name, word in _JUDGED.findall(verdict):
            said["secondary" if secondary else "primary"][name] = word
    assert said == {part["family"]: part["verdicts"] for part in rules.values()}


def test_verdicts_in_the_table_of_claims_follow_the_criterion() -> None:
    """It says "supported" if a p is below 5 %, and "not resolved" if one is not; of what was not preregistered."""
    _marked(ROOT / "docs/reference/results/paper.md")
    checked = []
    for measured, verdict in _verdict_rows():
        expressions = re.findall(r"<!-- (\w+): ((?:welch|paired)_p\(.*?\)) -->", measured)
        values = [mean(evaluate(expression, DATA[data]())) for data, expression in expressions]
        exploratory = _JUDGED.sub("", verdict)
        stated = {word for word in ("supported", "not resolved") if word in exploratory}
        if stated:
            assert {"supported" if value < 0.05 else "not resolved" for value in values} == stated, measured
            checked += stated
    assert checked.count("not resolved") >= 3
    assert checked.count("supported") >= 1


# Decimal numbers in the pages of results that are no results of ours, with the reason.
EXCEPTIONS: dict[str, dict[str, str]] = {
    "docs/reference/results/alive.md": dict.fromkeys(("0.1", "0.2", "0.9"), "a weight, a setting"),
    "docs/reference/results/photographs.md": dict.fromkeys(
        ("1.0", "2.0", "3.0", "4.0"), "the version of a licence"
    ),
    "docs/reference/results/round-trips.md": {
        "0.3": "weights, which are settings, and the aim",
        "0.003": "a penalty of the search, a setting",
        "0.04": "a penalty of the search, a setting",
    },
    "docs/reference/results/training.md": {"0.001": "a rate, a setting"},
    "docs/reference/results/benchmarks.md": {
        "0.99": "the decay of a peer's moving average, a setting",
        "1.05": "the aim of the comparison of two versions",
        "1.4": "the target of the row about cdist",
        "2.13": "a version of torch",
    },
    "docs/guides/codebook-collapse.md": {"0.9": "a decay, a setting"},
}
RESULTS_PAGES = sorted(
    {"README.md", "docs/guides/token-stability.md", *EXCEPTIONS}
    | {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs/reference/results").glob("*.md")}
)


def _results_of(page: str) -> str:
    """The part of a page that states results: all, or of the README its section."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return text if page != "README.md" else text.partition("\n## Results\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("page", RESULTS_PAGES)
def test_results_in_prose_are_marked(page: str) -> None:
    """A decimal number without a marker is one of the exceptions, and no exception is left over."""
    found = [number for _, number in unmarked_decimals(_results_of(page))]
    assert sorted(set(found)) == sorted(EXCEPTIONS.get(page, {})), unmarked_decimals(_results_of(page))
