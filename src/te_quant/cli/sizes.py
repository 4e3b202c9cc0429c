"""Sizes that do not fit, refused in terms of the command line, before anything is measured."""

from __future__ import annotations

from te_quant._checks import require

__all__ = ["require_protocol", "require_sides"]


def require_sides(sides: tuple[int, int], step: int, least: int = 1) -> None:
    """Refuse images that cannot be cut into tokens.

    Args:
        sides: height and width of the images, pixels.
        step: what both must be a multiple of.
        least: how often it must fit at least.

    Raises:
        ValueError: a side does not fit; the message names a size that does.
    """
    fits = all(side % step == 0 and side >= least * step for side in sides)
    expected = f"multiples of {step}" + (f", at least {least * step}" if least > 1 else "")
    size = max(least, min(sides) // step) * step
    require(fits, "images sides", expected, f"{_text(sides)}; pass --size {size} to resize and cut them")


def require_protocol(sides: tuple[int, int], window: int | None, protocol: str, stride: int) -> None:
    """Refuse images and a window that do not fit each other or the protocol.

    Args:
        sides: height and width of the images, pixels.
        window: ``--window``; None lets the measurement choose.
        protocol: ``circular``, ``canvas`` or ``crop``.
        stride: pixels per token.

    Raises:
        ValueError: something does not fit; the message names the option that helps.
    """
    if protocol == "crop":
        if window is not None:
            _require_inside(sides, window, stride)
        return
    halves = window is not None and (2 * sides[0], 2 * sides[1]) == (window, window)
    if protocol == "circular":
        # Images of half the window are sprites, which move on a canvas that wraps around.
        fits = window is None or halves or sides == (window, window)
        require(fits, "--window", "given with --protocol crop or canvas", f"--window {window} under circular")
    elif window is not None:
        cure = f"{_text(sides)}; pass --size {max(1, window // 2)} to resize and cut them"
        require(halves, "images sides", f"half of --window {window} under canvas", cure)
    # The quadrants of a canvas have whole tokens.
    require_sides(sides, 2 * stride if halves or protocol == "canvas" else stride)


def _require_inside(sides: tuple[int, int], window: int, stride: int) -> None:
    # It moves by a token in every direction, and two tokens are the fewest of which both windows show one.
    room, least = min(sides) - 2 * stride, 2 * stride
    cure = f"{_text(sides)}; pass larger images"
    require(room >= least, "images sides", f"at least {2 * least} under crop", cure)
    cure = f"{window}; pass --window {room // stride * stride}, or larger images"
    require(window <= room, "--window", f"at most {room} in images of {_text(sides)}", cure)
    require(window >= least, "--window", f"at least {least}, two tokens", f"{window}; pass --window {least}")
    cure = f"{window}; pass --window {window // stride * stride}"
    require(window % stride == 0, "--window", f"a multiple of {stride}", cure)


def _text(sides: tuple[int, int]) -> str:
    return f"{sides[0]}x{sides[1]}"
