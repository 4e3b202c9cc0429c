"""Answer the open questions about GPUs in less than eight minutes: ``python -m benchmarks.gpu``."""
