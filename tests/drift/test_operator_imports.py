"""What the operator imports: it runs in every cluster all the time, so what it does not need it does not have."""

from __future__ import annotations

import subprocess
import sys

HEAVY = {"scipy", "rich", "matplotlib", "torch", "onnx"}
PROGRAM = """
import sys
import ensemble_operator.cli
from ensemble_operator.control import process, reconcile
print(*sys.modules)
"""


def test_the_operator_plans_in_another_process() -> None:
    """Planning wants scipy, 45 MiB of it: the planning process has it, and ends."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    imported = set(done.stdout.split())
    assert {"kopf", "kubernetes", "numpy"} <= imported
    assert not HEAVY & imported
