"""Stage 1: presets, training and evaluation of the tokenizers."""
