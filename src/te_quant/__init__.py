"""Vector quantizers for image tokenizers that stay translation-equivariant, and the tools to measure it.

Public names and submodules are imported when they are first used, which keeps ``import te_quant`` quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from te_quant import _execution as _execution
from te_quant import _values as _values
from te_quant import functional as functional

# These three register all operators of the library, so that a saved graph of them can be loaded after this import.
from te_quant._version import __version__ as __version__

if TYPE_CHECKING:
    from te_quant import autoencoder as autoencoder
    from te_quant import contract as contract
    from te_quant import equivariance as equivariance
    from te_quant import filters as filters
    from te_quant import gpt as gpt
    from te_quant import integrations as integrations
    from te_quant import interop as interop
    from te_quant import layers as layers
    from te_quant import quantizers as quantizers
    from te_quant import shifts as shifts
    from te_quant import stability as stability
    from te_quant import tables as tables
    from te_quant import testing as testing
    from te_quant import usage as usage
    from te_quant.autoencoder import AutoencoderConfig as AutoencoderConfig
    from te_quant.autoencoder import AutoencoderOutput as AutoencoderOutput
    from te_quant.autoencoder import VQAutoencoder as VQAutoencoder
    from te_quant.autoencoder import build_decoder as build_decoder
    from te_quant.autoencoder import build_encoder as build_encoder
    from te_quant.contract import Encoding as Encoding
    from te_quant.contract import EquivarianceContract as EquivarianceContract
    from te_quant.equivariance import EquivarianceReport as EquivarianceReport
    from te_quant.equivariance import measure_equivariance as measure_equivariance
    from te_quant.gpt import GPT as GPT
    from te_quant.gpt import GPTConfig as GPTConfig
    from te_quant.gpt import Segment as Segment
    from te_quant.layers import BlurPool2d as BlurPool2d
    from te_quant.quantizers import FSQ as FSQ
    from te_quant.quantizers import LFQ as LFQ
    from te_quant.quantizers import ProductQuantizer as ProductQuantizer
    from te_quant.quantizers import Quantizer as Quantizer
    from te_quant.quantizers import QuantizerOutput as QuantizerOutput
    from te_quant.quantizers import ResidualVectorQuantizer as ResidualVectorQuantizer
    from te_quant.quantizers import SimVQ as SimVQ
    from te_quant.quantizers import VectorQuantizer as VectorQuantizer
    from te_quant.stability import StabilityReport as StabilityReport
    from te_quant.stability import TokenStability as TokenStability
    from te_quant.stability import measure_stability as measure_stability
    from te_quant.usage import CodebookUsage as CodebookUsage
    from te_quant.usage import CodebookUsageReport as CodebookUsageReport

# Each public submodule, and those of its names that this package has too. Type checkers read the block above.
_SUBMODULES: dict[str, tuple[str, ...]] = {
    "autoencoder": (
        "AutoencoderConfig",
        "AutoencoderOutput",
        "VQAutoencoder",
        "build_decoder",
        "build_encoder",
    ),
    "contract": ("Encoding", "EquivarianceContract"),
    "equivariance": ("EquivarianceReport", "measure_equivariance"),
    "filters": (),
    "functional": (),
    "gpt": ("GPT", "GPTConfig", "Segment"),
    "integrations": (),
    "interop": (),
    "layers": ("BlurPool2d",),
    "quantizers": (
        "FSQ",
        "LFQ",
        "ProductQuantizer",
        "Quantizer",
        "QuantizerOutput",
        "ResidualVectorQuantizer",
        "SimVQ",
        "VectorQuantizer",
    ),
    "shifts": (),
    "stability": ("StabilityReport", "TokenStability", "measure_stability"),
    "tables": (),
    "testing": (),
    "usage": ("CodebookUsage", "CodebookUsageReport"),
}
_HOMES = {name: submodule for submodule, names in _SUBMODULES.items() for name in names}

__all__ = sorted((*_HOMES, "__version__"))


def __getattr__(name: str) -> Any:
    """Import a public name or submodule when it is first used (PEP 562)."""
    import importlib

    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    special = (name for name in globals() if name.startswith("__"))
    return sorted({*special, *_SUBMODULES, *_HOMES})
