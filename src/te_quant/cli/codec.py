"""The commands that write tokens, pictures and models."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch
from torch import Tensor

from te_quant._checks import require
from te_quant._measuring.progress import progress
from te_quant._measuring.text import counted
from te_quant.autoencoder import TiledAutoencoder, VQAutoencoder, pad_to_divisor
from te_quant.autoencoder.tiling import has_exact_tokens
from te_quant.cli.arguments import Options
from te_quant.cli.files import require_new
from te_quant.cli.models import device_of, identity, load_autoencoder
from te_quant.cli.pictures import find_pictures, read_picture, write_picture
from te_quant.cli.token_file import (
    TOKENS_SUFFIX,
    ImageTokens,
    TokenFile,
    compact_dtype,
    read_tokens,
    write_tokens,
)
from te_quant.interop import save_diffusers

__all__ = ["convert", "decode", "encode"]

_Item = TypeVar("_Item")
_FILES = {
    "te_quant": ("config.json", "model.safetensors"),
    "diffusers": ("config.json", "diffusion_pytorch_model.safetensors"),
}


def encode(options: Options) -> tuple[str, dict[str, Any]]:
    """Write the tokens of images of any size into one file."""
    output = _output(options)
    good = output.suffix.lower() in ("", TOKENS_SUFFIX)
    require(good, "--output", f"a name that ends in {TOKENS_SUFFIX} or has no suffix", output)
    require_new([output], overwrite=options.overwrite)
    pictures = find_pictures(options.images, options.limit)
    model = load_autoencoder(options)
    config, device = model.config, device_of(options.device)
    if options.tile_size is not None and not has_exact_tokens(model):
        sys.stderr.write(
            f"te-quant encode: warning: pictures larger than a tile of {options.tile_size} pixels get "
            "other tokens than without --tile-size, because this encoder has layers that read the whole image, "
            "such as GroupNorm or attention.\n"
        )
    read = (
        (picture.name, read_picture(picture.path, config.image_channels, options.size))
        for picture in progress(
            pictures, total=len(pictures), description="encode", show=options.progress, unit="images"
        )
    )
    padded = (
        (name, (image.shape[-2], image.shape[-1]), pad_to_divisor(image[None], config.divisor)[0])
        for name, image in read
    )
    found: dict[str, ImageTokens] = {}
    for batch in _batches(padded, options.batch_size, lambda entry: tuple(entry[2].shape)):
        images = torch.stack([image for _, _, image in batch]).to(device)
        indices, phases = _encode_batch(model, images, options.tile_size)
        for (name, size, _), own, phase in zip(batch, indices.cpu(), phases, strict=True):
            found[name] = ImageTokens(own, size, phase)
    # Batches of equal sides finish in another order than the pictures came.
    found = {picture.name: found[picture.name] for picture in pictures}
    about = TokenFile(options.model, identity(model), model.quantizer.num_codes, config.stride)
    write_tokens(output, about, found)
    tokens = sum(image.indices.numel() for image in found.values())
    used = len(torch.cat([image.indices.flatten() for image in found.values()]).unique())
    dtype = str(compact_dtype(about.num_codes)).removeprefix("torch.")
    text = (
        f"{output}: {counted(tokens, 'token')} of {counted(len(found), 'image')} as {dtype}, "
        f"{used:,} of {about.num_codes:,} codes used"
    )
    values = {"output": str(output), "images": len(found), "tokens": tokens, "codes_used": used, "dtype": dtype}
    return text, {**values, "num_codes": about.num_codes, "identity": about.identity}


def decode(options: Options) -> tuple[str, dict[str, Any]]:
    """Write the pictures that tokens stand for, at their first size."""
    folder = _output(options)
    about, found = read_tokens(options.tokens)
    names = _picture_names(list(found))
    require_new((folder / names[name] for name in found), overwrite=options.overwrite)
    model = load_autoencoder(options)
    with_options = about.format > 1
    own = identity(model, with_options=with_options)
    expected = f"the model that wrote the tokens ({about.model}, identity {about.identity})"
    require(own == about.identity, "model", expected, f"{options.model}, identity {own}")
    if not with_options:
        sys.stderr.write(
            f"te-quant decode: warning: {options.tokens} is of format {about.format}, whose identity leaves out "
            "options such as the padding of the decoder; encode the pictures again to have these compared too.\n"
        )
    device = device_of(options.device)
    batches = list(_batches(found.items(), options.batch_size, lambda entry: tuple(entry[1].indices.shape)))
    written = 0
    try:
        for batch in progress(
            batches, total=len(batches), description="decode", show=options.progress, unit="batches"
        ):
            indices = torch.stack([image.indices for _, image in batch]).to(device)
            for (name, image), pixels in zip(
                batch, _decode_batch(model, indices, batch, options.tile_size), strict=True
            ):
                height, width = image.size
                write_picture(folder / names[name], pixels[:, :height, :width])
                written += 1
    except KeyboardInterrupt as stop:
        done = f"{written:,} of {counted(len(found), 'picture')} written to {folder}"
        raise KeyboardInterrupt(f"{done}; pass --overwrite to write all of them") from stop
    return f"{folder}: {counted(len(found), 'picture')}", {
        "output": str(folder),
        "pictures": [names[n] for n in found],
    }


def convert(options: Options) -> tuple[str, dict[str, Any]]:
    """Write a model in another format; the weights keep their dtype."""
    folder = _output(options)
    files = _FILES[options.to]
    require_new((folder / name for name in files), overwrite=options.overwrite)
    model = load_autoencoder(options, dtype=None)
    if options.to == "diffusers":
        save_diffusers(model, folder)
    else:
        model.save_pretrained(folder)
    config = model.config
    text = f"{folder}: {', '.join(files)} ({config.num_codes:,} codes, {config.stride} pixels per token)"
    values = {"output": str(folder), "files": list(files), "num_codes": config.num_codes, "stride": config.stride}
    return text, {**values, "identity": identity(model)}


@torch.no_grad()
def _encode_batch(
    model: VQAutoencoder, images: Tensor, tile_size: int | None
) -> tuple[Tensor, Sequence[Tensor | None]]:
    if tile_size is not None:
        return TiledAutoencoder(model, tile_size=tile_size).encode_to_indices(images), [None] * len(images)
    latents, phases = model.encode_with_phases(images)
    indices = model.quantizer.encode(latents)
    return indices, list(phases.cpu()) if model.decoder.adaptive else [None] * len(images)


@torch.no_grad()
def _decode_batch(
    model: VQAutoencoder, indices: Tensor, batch: Sequence[tuple[str, ImageTokens]], tile_size: int | None
) -> Tensor:
    if tile_size is not None:
        return TiledAutoencoder(model, tile_size=tile_size).decode_indices(indices)
    phases = [image.phases for _, image in batch if image.phases is not None]
    return model.decode_indices(indices, torch.stack(phases).to(indices.device) if phases else None)


def _batches(items: Iterable[_Item], size: int, key: Any) -> Iterator[list[_Item]]:
    """Put up to ``size`` items of the same key together, and hold no more than one batch per key."""
    waiting: dict[Any, list[_Item]] = defaultdict(list)
    for item in items:
        batch = waiting[key(item)]
        batch.append(item)
        if len(batch) == size:
            yield waiting.pop(key(item))
    yield from waiting.values()


def _picture_names(names: list[str]) -> dict[str, str]:
    """Return a PNG name for each picture: another ending, or one more where two would become the same."""
    chosen = {name: PurePosixPath(name).with_suffix(".png").as_posix() for name in names}
    # Again, as a longer name may be the short one of another picture.
    while len(set(chosen.values())) < len(chosen):
        taken = Counter(chosen.values())
        chosen = {name: png if taken[png] == 1 else f"{name}.png" for name, png in chosen.items()}
    return chosen


def _output(options: Options) -> Path:
    return options.output if options.output is not None else Path()
