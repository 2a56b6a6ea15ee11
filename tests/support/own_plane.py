"""A second control plane, whose API server may be killed and frozen without harm to other tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.control_plane import ControlPlane


@pytest.fixture(scope="session")
def own_plane(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """For tests that stop it; each leaves it running."""
    plane = ControlPlane(control_plane.binaries, tmp_path_factory.mktemp("own") / "plane")
    try:
        plane.start()
        yield plane
    finally:
        plane.end()
