"""``python -m te_quant`` is the command ``te-quant``."""

import sys

from te_quant.cli import main

if __name__ == "__main__":
    sys.exit(main())
