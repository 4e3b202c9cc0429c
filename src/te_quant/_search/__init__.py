"""The nearest code of every latent vector, in tiles, as dispatcher operators."""

from te_quant._search.operators import ENGINE, FUSED, sample_codes, search_codes

__all__ = ["ENGINE", "FUSED", "sample_codes", "search_codes"]
