"""Picture files as tensors in [-1, 1], and back.

Shape letters: N pictures, I image channels, H W pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from te_quant._checks import require
from te_quant._pretrained import write_atomically

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["SUFFIXES", "Picture", "find_pictures", "read_batch", "read_picture", "write_picture"]

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""What counts as a picture in a folder, in lower case; hidden files never do."""

_MODES = {1: "L", 3: "RGB"}
_WHITE = (255, 255, 255, 255)


class Picture(NamedTuple):
    """One file.

    Attributes:
        name: file name, or path within the folder that was given, with slashes.
        path: of the file.
    """

    name: str
    path: Path


def find_pictures(sources: Sequence[Path], limit: int | None = None) -> list[Picture]:
    """List files, and the pictures of folders and of the folders in them, sorted by name within each folder.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: a folder holds no picture, or two pictures have the same name.
    """
    found: dict[str, Picture] = {}
    for source in sources:
        for picture in _pictures_of(source):
            other = found.setdefault(picture.name, picture)
            cure = f"two of {picture.name!r} ({other.path} and {picture.path}); give the folder above both"
            require(other.path == picture.path, "pictures", "of different names", cure)
    return list(found.values())[:limit]


def _pictures_of(source: Path) -> list[Picture]:
    if source.is_file():
        return [Picture(source.name, source)]
    if not source.is_dir():
        raise FileNotFoundError(f"images must be files or folders that exist, got {source}.")
    inside = sorted(path for path in source.rglob("*") if path.is_file() and path.suffix.lower() in SUFFIXES)
    names = [path.relative_to(source) for path in inside]
    visible = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    require(bool(visible), "images", f"a folder with at least one picture ({', '.join(SUFFIXES)})", f"{source}")
    return [Picture(name.as_posix(), source / name) for name in visible]


def read_picture(path: Path, channels: int, size: int | None = None) -> Tensor:
    """Return a picture as a viewer shows it, but without colour management.

    It is turned as its EXIF tag says, and transparent pixels are put on white.

    Args:
        path: of the file.
        channels: I; 1 makes it grey, 3 colours.
        size: resize the shorter side to so many pixels and cut out the square in the middle.

    Shape:
        result: (I, H, W) float32 in [-1, 1].

    Raises:
        ValueError: the file is no picture or damaged, or ``channels`` is neither 1 nor 3.
    """
    require(channels in _MODES, "model", "one for images of 1 or 3 channels, as files have them", channels)
    picture = _convert(_decode(path), _MODES[channels])
    if size is not None:
        picture = _square(picture, size)
    pixels = torch.from_numpy(np.asarray(picture).reshape(picture.height, picture.width, channels).copy())
    return pixels.movedim(-1, 0).float() / 127.5 - 1


def read_batch(pictures: Sequence[Picture], channels: int, size: int | None = None) -> Tensor:
    """Return pictures of one size as (N, I, H, W) float32 in [-1, 1].

    Raises:
        ValueError: sizes differ, or as :func:`read_picture`.
    """
    images: list[Tensor] = []
    for picture in pictures:
        image = read_picture(picture.path, channels, size)
        if images and image.shape != images[0].shape:
            first, this = ("{1}x{2}".format(*tensor.shape) for tensor in (images[0], image))
            got = f"{first} ({pictures[0].name}) and {this} ({picture.name}); pass --size to resize and cut them"
            require(False, "images", "of one size", got)
        images.append(image)
    return torch.stack(images)


def write_picture(path: Path, image: Tensor) -> None:
    """Write (I, H, W) in [-1, 1] as a PNG file, completely or not at all; values outside are clamped."""
    from PIL import Image

    pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(0, -1).cpu().numpy()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    write_atomically(path, lambda beside: picture.save(beside, format="PNG"))


def _decode(path: Path) -> Image.Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # Beyond twice the size of this warning Pillow refuses by itself.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                opened.load()
                return ImageOps.exif_transpose(opened)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} must be a picture that Pillow can read, got a file of another kind.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} must be small enough for Pillow, got a larger picture ({error})") from error
    except (OSError, SyntaxError, EOFError) as error:
        # Pillow's decoders end damaged files by any of these.
        raise ValueError(f"{path} must be a whole picture, got a damaged file ({error}).") from error


def _convert(picture: Image.Image, mode: str) -> Image.Image:
    from PIL import Image

    if picture.mode.startswith("I"):
        # Pillow would clip sixteen bits at 255 instead of scaling them.
        values = np.asarray(picture).astype(np.int64).clip(0, 2**16 - 1)
        picture = Image.fromarray(((values * 255 + 2**15) // (2**16 - 1)).astype(np.uint8))
    if picture.mode.endswith("A") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, _WHITE), layer)
    return picture.convert(mode)


def _square(picture: Image.Image, size: int) -> Image.Image:
    from PIL import Image

    scale = size / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    if (width, height) != picture.size:
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))
