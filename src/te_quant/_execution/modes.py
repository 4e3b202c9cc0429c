"""Who runs the code: eager mode, a compiler, an exporter, or a function transform.

Only the first two can run the operators of this package. An exported graph has to run where the package is not
installed, and a function transform has no rule for them.
"""

from __future__ import annotations

import torch

__all__ = ["in_transform", "is_exporting", "refuse_training_export", "wants_plain"]


# torch.compile of torch 2.9 to 2.11 takes every call of torch.compiler.is_exporting() for True; 2.12 is untried.
_READS_FLAG = torch.__version__ < "2.13"  # a TorchVersion, which compares versions


def in_transform() -> bool:
    """Say whether a transform of ``torch.func`` (``vmap``, ``grad``, ``jvp``, ...) runs; compilers trace this."""
    return torch._C._are_functorch_transforms_active()


def is_exporting() -> bool:
    """Say whether ``torch.export`` or the ONNX exporter records a graph."""
    exporting = torch.compiler._is_exporting_flag if _READS_FLAG else torch.compiler.is_exporting()
    return exporting or torch.onnx.is_in_onnx_export()


def refuse_training_export(training: bool, owner: str) -> None:
    """Refuse to record ``owner`` in training mode: a program would draw dropout, and lose what a pass records."""
    if training and is_exporting():
        raise RuntimeError(f"mode must be evaluation to export {owner}, got training; call eval() first.")


def wants_plain() -> bool:
    """Say whether only torch's own operators may be called."""
    return is_exporting() or in_transform()
