"""`python -m ensemble_operator` is the command `ensemble`."""

from __future__ import annotations

import sys

from ensemble_operator.cli import main

if __name__ == "__main__":
    sys.exit(main())
