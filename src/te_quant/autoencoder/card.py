"""What the README of an autoencoder on the hub says of it."""

from __future__ import annotations

from collections.abc import Mapping

from te_quant._pretrained import Report, write_card
from te_quant.autoencoder.config import AutoencoderConfig
from te_quant.contract import EquivarianceContract
from te_quant.tables import Table

__all__ = ["autoencoder_card"]

_FOLLOWS = {
    "integer": "follow every circular shift of the image by whole pixels",
    "stride": "follow circular shifts of the image by multiples of the stride",
    "interior": "follow shifts by multiples of the stride while the content stays away from the border",
    "none": "follow no shift exactly",
}


def autoencoder_card(
    config: AutoencoderConfig,
    contract: EquivarianceContract,
    parameters: int,
    *,
    repo_id: str,
    reports: Mapping[str, Report],
    license_name: str | None,
) -> str:
    """Return the card; see :meth:`~te_quant.VQAutoencoder.model_card`."""
    sides = f"H and W divisible by {config.divisor}"
    quantizer = "VectorQuantizer" if config.quantizer is None else str(config.quantizer["name"])
    facts = [
        ["pixels per token along each side", f"{config.stride}"],
        ["codes", f"{config.num_codes:,}"],
        ["size of a code", f"{config.code_dim}"],
        ["quantizer", f"`{quantizer}`"],
        ["parameters", f"{parameters:,}"],
        ["tokens", _FOLLOWS[contract.group]],
    ]
    return write_card(
        repo_id,
        tags=("image-tokenizer", "vector-quantization"),
        summary=(
            "An image tokenizer: an encoder, a vector quantizer and a decoder. Its tokens are a grid of integers."
        ),
        code=(
            "from te_quant import VQAutoencoder\n\n"
            f"model = VQAutoencoder.from_pretrained({repo_id!r})\n"
            f"tokens = model.encode_to_indices(images)  # (B, {config.image_channels}, H, W) in [-1, 1], {sides}\n"
            "images = model.decode_indices(tokens)\n"
        ),
        facts=Table(["property", "value"], facts, "ll").to_markdown(),
        reports=reports,
        license_name=license_name,
    )
