"""What several integration tests share for a session."""

from tests.support.control_plane import control_plane, namespace
from tests.support.data_plane import workers
from tests.support.own_plane import own_plane

__all__ = ["control_plane", "namespace", "own_plane", "workers"]
