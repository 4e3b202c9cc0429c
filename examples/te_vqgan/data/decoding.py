"""One picture file as pixels: decoded, upright, three channels of eight bits, and reduced by whole factors.

Shape letters: H W pixels.
"""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from examples.te_vqgan.runs.checks import require

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["decode", "reduced"]

_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV")
_WHITE = (255, 255, 255, 255)


def decode(content: bytes, name: str) -> NDArray[np.uint8]:
    """Decode a picture as a viewer shows it, but without colour management.

    It is turned as its EXIF tag says; of a file with several frames the first counts. Grey values are repeated in
    three channels, sixteen bits are rounded to eight, CMYK and palettes become RGB by their plain formulas, and
    transparent pixels are put on white.

    Args:
        content: of the file.
        name: of the file, for messages.

    Shape:
        result: (H, W, 3) uint8.

    Raises:
        ValueError: the content is no picture, is damaged, is larger than Pillow takes, or has a mode that is not
            converted here, such as floating-point numbers; the message names the file.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # Beyond twice the size of this warning Pillow refuses by itself.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as opened:
                opened.load()
                picture = ImageOps.exif_transpose(opened)
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} must be a picture that Pillow can read, got a file of another kind.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} must be small enough for Pillow, got a larger picture ({error})") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        # Pillow's decoders end damaged files by any of these.
        raise ValueError(f"{name} must be a whole picture, got a damaged file ({error}).") from error
    return _rgb(picture, name)


def reduced(pixels: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """Average blocks of ``factor`` x ``factor`` pixels, rounding half up; what fills no block is cut off.

    Args:
        pixels: the picture.
        factor: at least 1, and at most the shorter side.

    Shape:
        pixels: (H, W, 3). result: (H // factor, W // factor, 3).
    """
    if factor == 1:
        return pixels
    height, width = (side // factor * factor for side in pixels.shape[:2])
    # Integers, so that every machine gets the same bytes.
    total = np.zeros((height // factor, width // factor, pixels.shape[2]), np.uint32)
    for row in range(factor):
        for column in range(factor):
            total += pixels[row:height:factor, column:width:factor]
    area = factor * factor
    result: NDArray[np.uint8] = ((total + area // 2) // area).astype(np.uint8)
    return result


def _rgb(picture: Image.Image, name: str) -> NDArray[np.uint8]:
    from PIL import Image

    if picture.mode in _SIXTEEN_BITS:
        values = np.asarray(picture).astype(np.int64)
        fits = values.min() >= 0 and values.max() < 2**16
        require(bool(fits), name, "a picture of at most sixteen bits per channel", "larger numbers")
        grey = ((values * 255 + 2**15) // (2**16 - 1)).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    known = ", ".join(_EIGHT_BITS)
    require(picture.mode in _EIGHT_BITS, name, f"of a mode among {known} or 16-bit grey", repr(picture.mode))
    if picture.mode.endswith("A") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, _WHITE), layer)
    return np.asarray(picture.convert("RGB"))
