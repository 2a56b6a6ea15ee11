"""What several integration tests share."""

from tests.support.control_plane import control_plane, namespace
from tests.support.data_plane import workers
from tests.support.link_strangers import address, linker
from tests.support.own_plane import own_plane

__all__ = ["address", "control_plane", "linker", "namespace", "own_plane", "workers"]
