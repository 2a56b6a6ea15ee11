"""What several integration tests share for a session."""

from tests.support.data_plane import workers

__all__ = ["workers"]
