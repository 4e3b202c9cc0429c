"""Digits, their composition on a canvas, captions, and the held-out combinations."""
