"""Who runs the code: eager mode, a compiler, an exporter, or a function transform.

Only the first two can run the operators of this package. An exported graph has to run where the package is not
installed, and a function transform has no rule for them.
"""

from __future__ import annotations

import torch

__all__ = ["in_transform", "is_exporting", "refuse_training_export", "wants_plain"]


def in_transform() -> bool:
    """Say whether a transform of ``torch.func`` (``vmap``, ``grad``, ``jvp``, ...) runs; compilers trace this."""
    return torch._C._are_functorch_transforms_active()


def is_exporting() -> bool:
    """Say whether ``torch.export`` or the ONNX exporter records a graph."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


def refuse_training_export(training: bool, owner: str) -> None:
    """Refuse to record ``owner`` in training mode: a program would draw dropout, and lose what a pass records."""
    if training and is_exporting():
        raise RuntimeError(f"mode must be evaluation to export {owner}, got training; call eval() first.")


def wants_plain() -> bool:
    """Say whether only torch's own operators may be called."""
    return is_exporting() or in_transform()
