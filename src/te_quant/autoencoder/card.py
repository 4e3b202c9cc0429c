"""The README of a repository on the hub: how to load the model, what it is, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from te_quant._checks import require, require_type
from te_quant.autoencoder.config import AutoencoderConfig
from te_quant.contract import EquivarianceContract
from te_quant.tables import Table

__all__ = ["Report", "write_card"]

_FOLLOWS = {
    "integer": "follow every circular shift of the image by whole pixels",
    "stride": "follow circular shifts of the image by multiples of the stride",
    "interior": "follow shifts by multiples of the stride while the content stays away from the border",
    "none": "follow no shift exactly",
}


class Report(Protocol):
    """Anything that writes itself as Markdown: the reports of this library, or your own."""

    def to_markdown(self) -> str:
        """Return tables."""
        ...


def write_card(
    config: AutoencoderConfig,
    contract: EquivarianceContract,
    parameters: int,
    *,
    repo_id: str,
    reports: Mapping[str, Report],
    license_name: str | None,
) -> str:
    """Return the card; see :meth:`~te_quant.VQAutoencoder.model_card`."""
    require_type("repo_id", repo_id, str, "a hub id 'owner/name'")
    require_type("reports", reports, Mapping, "a mapping from titles to reports")
    for title, report in reports.items():
        has = callable(getattr(report, "to_markdown", None))
        require(has, f"reports[{title!r}]", "a report with to_markdown()", type(report).__name__)
    header = ["library_name: te_quant", "tags:", "- image-tokenizer", "- vector-quantization"]
    if license_name is not None:
        require_type("license_name", license_name, str, "an identifier of the hub such as 'mit', or None")
        header.insert(0, f"license: {license_name}")
    sides = f"H and W divisible by {config.divisor}"
    code = (
        "from te_quant import VQAutoencoder\n\n"
        f"model = VQAutoencoder.from_pretrained({repo_id!r})\n"
        f"tokens = model.encode_to_indices(images)  # (B, {config.image_channels}, H, W) in [-1, 1], {sides}\n"
        "images = model.decode_indices(tokens)\n"
    )
    quantizer = "VectorQuantizer" if config.quantizer is None else str(config.quantizer["name"])
    facts = [
        ["pixels per token along each side", f"{config.stride}"],
        ["codes", f"{config.num_codes:,}"],
        ["size of a code", f"{config.code_dim}"],
        ["quantizer", f"`{quantizer}`"],
        ["parameters", f"{parameters:,}"],
        ["tokens", _FOLLOWS[contract.group]],
    ]
    sections = [
        "---\n" + "\n".join(header) + "\n---\n",
        f"# {repo_id.rpartition('/')[2]}\n",
        "An image tokenizer: an encoder, a vector quantizer and a decoder. Its tokens are a grid of integers.\n",
        f"```python\n{code}```\n",
        Table(["property", "value"], facts, "ll").to_markdown(),
    ]
    for title, report in reports.items():
        sections += [f"## {title}\n", report.to_markdown().rstrip() + "\n"]
    return "\n".join(sections)
