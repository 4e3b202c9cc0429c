"""Vector quantizers for image tokenizers that stay translation-equivariant, and the tools to measure it."""

from te_quant._version import __version__
from te_quant.quantizers import QuantizerOutput, VectorQuantizer
from te_quant.usage import CodebookUsage, CodebookUsageReport

__all__ = ["CodebookUsage", "CodebookUsageReport", "QuantizerOutput", "VectorQuantizer", "__version__"]
