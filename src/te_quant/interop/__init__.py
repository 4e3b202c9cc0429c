"""Weights of other libraries, read into models of this one, and written back where they can be expressed there."""

__all__: list[str] = []
