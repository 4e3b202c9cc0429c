"""The command ``te-quant``; ``python -m te_quant`` is the same."""

from te_quant.cli.entry import main

__all__ = ["main"]
