"""How fast, how large, against whom: ``python -m benchmarks`` measures, judges and writes it down."""

import os

# Threads of OpenBLAS, which numpy, scipy and scikit-learn bring, keep a core busy after each call. On two cores
# whatever torch computes in the next tenth of a second then took twice as long. Read when numpy is imported.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "8")
