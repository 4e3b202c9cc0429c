"""Adapters for other libraries, one module per library; each needs that library installed."""

__all__: list[str] = []
