"""The one message format for refused arguments, and the checks that look at values."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from te_quant import _checks, _values
from tests.helpers import exactly


def test_require_names_expected_and_actual() -> None:
    """A false condition raises; a true one does not."""
    _checks.require(True, "x", "small", 3)
    with pytest.raises(ValueError, match=exactly("x must be small, got 3.")):
        _checks.require(False, "x", "small", 3)


@pytest.mark.parametrize("value", [True, 1.0, "1", None, torch.tensor(1)])
def test_require_int_refuses_other_types(value: object) -> None:
    """Only a real int is an int."""
    with pytest.raises(TypeError, match=exactly(f"k must be an int >= 1, got {value!r}.")):
        _checks.require_int("k", value, 1)


@given(st.integers(-5, 5), st.one_of(st.none(), st.integers(-3, 0)), st.one_of(st.none(), st.integers(0, 3)))
@settings(deadline=None, max_examples=60)
def test_require_int_bounds(value: int, low: int | None, high: int | None) -> None:
    """Both bounds are inclusive and each may be absent."""
    if (low is None or value >= low) and (high is None or value <= high):
        _checks.require_int("k", value, low, high)
    else:
        with pytest.raises(ValueError, match=rf"^k must be an int.*, got {value}\.$"):
            _checks.require_int("k", value, low, high)


@pytest.mark.parametrize(
    ("value", "bounds", "error", "message"),
    [
        (5, (1, 4), ValueError, "k must be an int >= 1 and <= 4, got 5."),
        (5, (None, 4), ValueError, "k must be an int <= 4, got 5."),
        ("a", (), TypeError, "k must be an int, got 'a'."),
    ],
)
def test_require_int_states_its_bounds(
    value: object, bounds: tuple[int | None, ...], error: type[Exception], message: str
) -> None:
    """Those that there are, and no other."""
    with pytest.raises(error, match=exactly(message)):
        _checks.require_int("k", value, *bounds)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.1, 1.1])
def test_require_number_refuses_values(value: float) -> None:
    """Out of bounds and not finite are refused alike."""
    with pytest.raises(ValueError, match=exactly(f"x must be a finite number >= 0 and <= 1, got {value!r}.")):
        _checks.require_number("x", value, 0.0, 1.0)


def test_require_number_bounds() -> None:
    """Minimum and maximum are inclusive, ``below`` is not."""
    for value in (0, 0.0, 1, 1.0, 0.5):
        _checks.require_number("x", value, 0.0, 1.0)
    _checks.require_number("x", -1e300)
    with pytest.raises(ValueError, match=exactly("x must be a finite number >= 0 and < 1, got 1.0.")):
        _checks.require_number("x", 1.0, 0.0, below=1.0)


@pytest.mark.parametrize("value", [True, "1", None, 1j])
def test_require_number_refuses_types(value: object) -> None:
    """A bool, a string and a complex are no real number."""
    with pytest.raises(TypeError, match=exactly(f"x must be a finite number, got {value!r}.")):
        _checks.require_number("x", value)


def test_require_choice() -> None:
    """The message lists the choices."""
    _checks.require_choice("m", "a", ("a", None))
    with pytest.raises(ValueError, match=exactly("m must be one of 'a', None, got 'b'.")):
        _checks.require_choice("m", "b", ("a", None))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.zeros(2), ValueError, "x must be of shape (N, C), got shape (2,)."),
        ([[1]], TypeError, "x must be a tensor, got list."),
    ],
)
def test_require_rank(value: object, error: type[Exception], message: str) -> None:
    """The message states the layout wanted and the shape got; anything but a tensor is a TypeError."""
    _checks.require_rank("x", torch.zeros(2, 3), (2,), "(N, C)")
    with pytest.raises(error, match=exactly(message)):
        _checks.require_rank("x", value, (2,), "(N, C)")  # type: ignore[arg-type]


def test_require_axis() -> None:
    """The message is the one the design promises."""
    _checks.require_axis("latents", torch.zeros(2, 8, 16, 16), 1, 8, "code_dim")
    message = "latents axis 1 must be code_dim=4, got 8 (latents shape (2, 8, 16, 16))."
    with pytest.raises(ValueError, match=exactly(message)):
        _checks.require_axis("latents", torch.zeros(2, 8, 16, 16), 1, 4, "code_dim")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_require_floating(dtype: torch.dtype) -> None:
    """Integer, boolean and complex tensors are refused."""
    with pytest.raises(TypeError, match=exactly(f"x must be floating point, got {dtype}.")):
        _checks.require_floating("x", torch.zeros(2, dtype=dtype))
    _checks.require_floating("x", torch.zeros(2, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_require_integer_tensor(dtype: torch.dtype) -> None:
    """Floating, boolean and complex tensors are refused."""
    _checks.require_integer_tensor("x", torch.zeros(2, dtype=torch.int32))
    with pytest.raises(TypeError, match=exactly(f"x must be an integer tensor, got {dtype}.")):
        _checks.require_integer_tensor("x", torch.zeros(2, dtype=dtype))


def test_require_integer_tensor_refuses_a_number() -> None:
    """An int is no tensor."""
    with pytest.raises(TypeError, match=exactly("x must be a tensor, got int.")):
        _checks.require_integer_tensor("x", 3)  # type: ignore[arg-type]


def test_require_device() -> None:
    """The message names both devices."""
    _checks.require_device("x", torch.zeros(1), torch.device("cpu"), "quantizer")
    with pytest.raises(ValueError, match=exactly("x must be on cpu as the quantizer, got meta.")):
        _checks.require_device("x", torch.zeros(1, device="meta"), torch.device("cpu"), "quantizer")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_require_finite_counts_what_it_refuses(bad: float) -> None:
    """Both the count of bad values and the total stand in the message."""
    values = torch.randn(4, 5)
    assert torch.equal(_values.require_finite("x", values), values)
    values[1, 2] = values[3, 4] = bad
    with pytest.raises(ValueError, match=exactly("x must be finite, got 2 NaN or infinite of 20 values.")):
        _values.require_finite("x", values)


def test_require_finite_sees_opposite_infinities() -> None:
    """+inf and -inf are found though they might cancel."""
    with pytest.raises(ValueError, match=exactly("x must be finite, got 2 NaN or infinite of 2 values.")):
        _values.require_finite("x", torch.tensor([math.inf, -math.inf]))


def test_require_finite_passes_sums_that_overflow() -> None:
    """Finite numbers whose sum is infinite are finite, and nothing at all is too."""
    huge = torch.full((8,), 3e38)
    assert not huge.sum().isfinite()
    assert torch.equal(_values.require_finite("x", huge), huge)
    assert _values.require_finite("x", torch.empty(0, 3)).shape == (0, 3)


def test_require_finite_carries_no_gradient() -> None:
    """The returned tensor is detached."""
    assert not _values.require_finite("x", torch.zeros(2, requires_grad=True)).requires_grad


@given(st.lists(st.integers(-3, 8), max_size=12), st.integers(1, 6), st.integers(-2, 0))
@settings(deadline=None, max_examples=60)
def test_require_in_range(values: list[int], stop: int, start: int) -> None:
    """Accepted exactly when all lie in [start, stop); one below is named before one above."""
    tensor = torch.tensor(values, dtype=torch.int64)
    if all(start <= v < stop for v in values):
        assert torch.equal(_values.require_in_range("i", tensor, stop, "K", start), tensor)
    else:
        named = min(values) if min(values) < start else max(values)
        with pytest.raises(ValueError, match=exactly(f"i must be in [{start}, K={stop}), got {named}.")):
            _values.require_in_range("i", tensor, stop, "K", start)


def test_value_operators_are_well_registered() -> None:
    """Schema, fake kernel and tracing of the two operators agree with what they do."""
    for values in (torch.randn(3, 4), torch.randn(4, 3).T, torch.randn(3, 1).expand(3, 4)):
        torch.library.opcheck(torch.ops.te_quant.check_finite, (values, "x"))
    torch.library.opcheck(torch.ops.te_quant.check_range, (torch.tensor([0, 1]), "i", 2, "K"))
    torch.library.opcheck(torch.ops.te_quant.check_range, (torch.tensor([-1, 1]), "i", 2, "K", -1))
    torch.library.opcheck(torch.ops.te_quant.check_finite, (torch.zeros(2), "x", "wait"))


def test_value_checks_are_operators_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a graph is traced the checks go through the operators, which return what they passed."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    values, indices = torch.randn(3), torch.tensor([0, 1])
    assert torch.equal(_values.require_finite("x", values), values)
    assert torch.equal(_values.require_in_range("i", indices, 2, "K"), indices)


NOT_FINITE = "x must be finite, got 1 NaN or infinite of 1 values."
OUT_OF_RANGE = "i must be in [0, K=2), got 2."


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _values.require_finite("x", torch.tensor([math.inf])), NOT_FINITE),
        (lambda: _values.require_in_range("i", torch.tensor([0, 2]), 2, "K"), OUT_OF_RANGE),
        (lambda: torch.ops.te_quant.check_finite(torch.tensor([math.nan]), "x"), NOT_FINITE),
        (lambda: torch.ops.te_quant.check_range(torch.tensor([0, 2]), "i", 2, "K"), OUT_OF_RANGE),
        (lambda: _values.require_finite("x", torch.tensor([math.inf]), "wait"), f"{NOT_FINITE[:-1]}; wait."),
        (
            lambda: _values.require_in_range("i", torch.tensor([-1, 0]), 2, "K", cure="wait"),
            "i must be in [0, K=2), got -1; wait.",
        ),
        # The cure is one for small integers.
        (lambda: _values.require_in_range("i", torch.tensor([0, 2]), 2, "K", cure="wait"), OUT_OF_RANGE),
    ],
    ids=["require_finite", "require_in_range", "check_finite", "check_range", "cure", "low", "high"],
)
def test_value_operators_raise_as_the_functions_do(
    call: Callable[[], object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operators, which stand in compiled graphs, refuse with the same sentences."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(ValueError, match=exactly(message)):
        call()
