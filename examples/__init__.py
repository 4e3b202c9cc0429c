"""Worked examples of te_quant; run them from the repository's root with ``python -m examples.NAME``."""
