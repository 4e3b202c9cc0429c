"""The names of tensors in other libraries, next to those of this one.

All of these libraries build the same networks and name their parts differently.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["DIFFUSERS", "LLAMAGEN", "TAMING", "Layout", "names_of"]


class Layout(NamedTuple):
    """How a library names the parts of encoder and decoder.

    Attributes:
        down: a level of the encoder; ``{}`` is its number, 0 the finest.
        up: a level of the decoder.
        finest_first: whether level 0 of the decoder is the finest, too; otherwise it is the first that runs.
        block: a residual block inside a level; ``{}`` is its number.
        attention: an attention block inside a level.
        middle: the first block, the attention and the second block between the levels and the quantizer.
        parts: pairs of our name and theirs, for parts of blocks and levels.
        projections: queries, keys and values of an attention block, which are one convolution here.
        padded: whether each 3x3 convolution of the encoder lies behind a padding layer, in a Sequential.
    """

    down: str
    up: str
    finest_first: bool
    block: str
    attention: str
    middle: tuple[str, str, str]
    parts: tuple[tuple[str, str], ...]
    projections: tuple[str, str, str]
    padded: bool = False


TAMING = Layout(
    down="encoder.down.{}",
    up="decoder.up.{}",
    finest_first=True,
    block="block.{}",
    attention="attn.{}",
    middle=("mid.block_1", "mid.attn_1", "mid.block_2"),
    parts=(("shortcut", "nin_shortcut"), ("out", "proj_out")),
    projections=("q", "k", "v"),
)
LLAMAGEN = TAMING._replace(
    down="encoder.conv_blocks.{}",
    up="decoder.conv_blocks.{}",
    finest_first=False,
    block="res.{}",
    middle=("mid.0", "mid.1", "mid.2"),
)
DIFFUSERS = Layout(
    down="encoder.down_blocks.{}",
    up="decoder.up_blocks.{}",
    finest_first=False,
    block="resnets.{}",
    attention="attentions.{}",
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    parts=(
        ("shortcut", "conv_shortcut"),
        ("out", "to_out.0"),
        ("norm", "group_norm"),
        ("norm_out", "conv_norm_out"),
        ("downsample", "downsamplers.0"),
        ("upsample", "upsamplers.0"),
    ),
    projections=("to_q", "to_k", "to_v"),
)
# Around the quantizer all of them agree.
_OUTSIDE = {
    "quantizer.codebook": "quantize.embedding.weight",
    "encoder.to_latents": "quant_conv",
    "decoder.from_codes": "post_quant_conv",
}
_MIDDLE = ("block0", "attention", "block1")
_CONVOLUTIONS = ("conv_in", "conv1", "conv2", "conv_out")


def names_of(own: str, layout: Layout, num_levels: int) -> tuple[str, ...]:
    """Return the names that a tensor of :class:`~te_quant.VQAutoencoder` has elsewhere.

    Args:
        own: its name in the ``state_dict`` of the autoencoder.
        layout: the other library.
        num_levels: of the autoencoder.

    Returns:
        one name, or three whose tensors follow each other along the first axis.
    """
    for ours, theirs in _OUTSIDE.items():
        if own.startswith(ours):
            return (theirs + own.removeprefix(ours),)
    half, place, *inside = own.split(".")
    start = half
    if place == "levels":
        level = int(inside.pop(0))
        if half == "decoder" and layout.finest_first:
            level = num_levels - 1 - level
        start = (layout.down if half == "encoder" else layout.up).format(level)
        inside[0] = _numbered(inside[0], layout)
    elif place == "middle":
        inside[0] = layout.middle[_MIDDLE.index(inside[0])]
    else:
        inside.insert(0, place)
    if layout.padded and half == "encoder" and inside[-2] in _CONVOLUTIONS:
        inside.insert(-1, "1")
    # Numbers and names of blocks are theirs by now, so only whole names inside of blocks are left to replace.
    path = f".{'.'.join(inside)}"
    for ours, theirs in layout.parts:
        path = path.replace(f".{ours}.", f".{theirs}.")
    if ".qkv." not in path:
        return (start + path,)
    return tuple(start + path.replace(".qkv.", f".{name}.") for name in layout.projections)


def _numbered(part: str, layout: Layout) -> str:
    for stem, template in (("block", layout.block), ("attention", layout.attention)):
        if part.startswith(stem):
            return template.format(part.removeprefix(stem))
    return part
