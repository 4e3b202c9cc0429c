"""How fast, how large, against whom: ``python -m benchmarks`` measures, judges and writes it down."""
