"""The quantizer family, trained with equal networks and compared."""
