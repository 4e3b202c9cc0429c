"""The metrics, one module each, as functions of tokens or latents."""
