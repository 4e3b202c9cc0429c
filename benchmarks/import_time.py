"""How long importing te_quant takes after torch, as the minimum over fresh processes.

Run ``python -m benchmarks.import_time``.

Wall time counts on a quiet machine; the time that the process computes hardly depends on what else runs.
"""

from __future__ import annotations

import json
import subprocess
import sys

__all__ = ["STATEMENTS", "import_times", "main"]

STATEMENTS = (
    "import te_quant",
    "from te_quant import VectorQuantizer",
    "from te_quant import VQAutoencoder, GPT, measure_equivariance",
)

_CODE = """
import json, time, torch, einops, numpy
wall, busy = time.perf_counter(), time.process_time()
{statement}
print(json.dumps([time.perf_counter() - wall, time.process_time() - busy]))
"""


def import_times(statement: str, processes: int = 5) -> tuple[float, float]:
    """Return the least wall time and the least computing time of ``statement``, in milliseconds.

    Args:
        statement: executed after torch, einops and numpy are imported.
        processes: how many fresh ones to start, at least 1.
    """
    runs = []
    for _ in range(processes):
        command = [sys.executable, "-c", _CODE.format(statement=statement)]
        runs.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    wall, busy = (1000 * min(times) for times in zip(*runs, strict=True))
    return wall, busy


def main() -> None:
    """Print one line per statement."""
    for statement in STATEMENTS:
        wall, busy = import_times(statement)
        print(f"{wall:6.1f} ms ({busy:5.1f} ms computing)  {statement}")


if __name__ == "__main__":
    main()
