"""Vector quantizers for image tokenizers that stay translation-equivariant, and the tools to measure it.

The quantizers are imported at once; the names that need more are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from te_quant._version import __version__
from te_quant.quantizers import (
    FSQ,
    LFQ,
    Quantizer,
    QuantizerOutput,
    ResidualVectorQuantizer,
    SimVQ,
    VectorQuantizer,
)
from te_quant.usage import CodebookUsage, CodebookUsageReport

if TYPE_CHECKING:
    from te_quant.autoencoder import (
        AutoencoderConfig,
        AutoencoderOutput,
        VQAutoencoder,
        build_decoder,
        build_encoder,
    )
    from te_quant.contract import Encoding, EquivarianceContract
    from te_quant.equivariance import EquivarianceReport, measure_equivariance
    from te_quant.gpt import GPT, GPTConfig, Segment
    from te_quant.layers import BlurPool2d

__all__ = [  # noqa: RUF022  (GPT is a class, for all its capitals)
    "AutoencoderConfig",
    "AutoencoderOutput",
    "BlurPool2d",
    "CodebookUsage",
    "CodebookUsageReport",
    "Encoding",
    "EquivarianceContract",
    "EquivarianceReport",
    "FSQ",
    "GPT",
    "GPTConfig",
    "LFQ",
    "Quantizer",
    "QuantizerOutput",
    "ResidualVectorQuantizer",
    "Segment",
    "SimVQ",
    "VQAutoencoder",
    "VectorQuantizer",
    "__version__",
    "build_decoder",
    "build_encoder",
    "measure_equivariance",
]

_HOMES = {
    "AutoencoderConfig": "autoencoder",
    "AutoencoderOutput": "autoencoder",
    "BlurPool2d": "layers",
    "Encoding": "contract",
    "EquivarianceContract": "contract",
    "EquivarianceReport": "equivariance",
    "GPT": "gpt",
    "GPTConfig": "gpt",
    "Segment": "gpt",
    "VQAutoencoder": "autoencoder",
    "build_decoder": "autoencoder",
    "build_encoder": "autoencoder",
    "measure_equivariance": "equivariance",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module (PEP 562), so that the quantizers alone stay quick to import."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
