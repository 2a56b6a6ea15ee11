"""Each test of the chart runs with Helm 3 and with Helm 4."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chart.helm import NAMES, Helm, tool
from tests.support.control_plane import ControlPlane, control_plane, namespace

__all__ = ["control_plane", "namespace"]


@pytest.fixture(params=NAMES)
def helm(request: pytest.FixtureRequest, tmp_path: Path) -> Helm:
    """Helm without a cluster."""
    return Helm(tool(request.param), tmp_path)


@pytest.fixture
def helm_there(helm: Helm, control_plane: ControlPlane) -> Helm:
    """Helm with a real API server, without nodes."""
    return Helm(helm.program, helm.home, control_plane.kubeconfig)
