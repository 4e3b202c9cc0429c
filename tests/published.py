"""Find the published results of the example, which a source distribution holds only in part."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "examples" / "te_vqgan" / "results"


def published(name: str) -> Path:
    """Return the path of a published file, such as ``"small/results.json"``; skip the test where it is left out.

    A source distribution has no ``.git``; in a clone a missing file is an error.
    """
    path = RESULTS / name
    if not path.exists() and not (ROOT / ".git").exists():
        pytest.skip(f"a source distribution leaves {name} out")
    return path
