"""A ring of records in shared memory: one writer process, one reader process, no lock.

The two positions are 8-byte counters of bytes ever written and read, each on a cache line of its own; a record is
visible once the writer has moved its counter. That order is what x86-64 processors keep for ordinary stores; on others
the local runner uses ZeroMQ instead (see `SUPPORTED`). Waking the reader is not the ring's business: an eventfd beside
it does.
"""

from __future__ import annotations

import platform
import struct

from ensemble_contract.errors import ProtocolError

SUPPORTED = platform.machine().lower() in ("x86_64", "amd64")

HEADER_BYTES = 128
_LENGTH = struct.Struct("<I")
_WRAP = 0xFFFF_FFFF


class Ring:
    """One direction of a link, over `memory`: 128 bytes of positions, then the records' bytes.

    A process only writes or only reads a ring, from its beginning on. Its own position is kept here and only published
    in the memory, so that what the peer writes there can end the link, but cannot lead this process astray.
    """

    def __init__(self, memory: memoryview) -> None:
        self._positions = memory[:HEADER_BYTES].cast("Q")
        self._records = memory[HEADER_BYTES:]
        self._capacity = len(self._records)
        self._written = self._read = 0
        if self._capacity % 8 or self._capacity < 1024:
            raise ValueError(f"a ring of {self._capacity} bytes: a multiple of 8 and at least 1024 is needed")

    def push(self, record: bytes) -> bool:
        """Append a record; False if there is no room for it now.

        Raises ValueError for a record of over half the ring, which might never fit, and ProtocolError when the reader's
        position is impossible.
        """
        need = (len(record) + 11) & ~7
        if need > self._capacity // 2:
            raise ValueError(f"a record of {len(record)} bytes is over half of the ring's {self._capacity}")
        written = self._written
        used = written - self._positions[8]
        if not 0 <= used <= self._capacity:
            raise ProtocolError("the ring's positions are impossible")
        at = written % self._capacity
        to_end = self._capacity - at
        skip = to_end if need > to_end else 0
        if self._capacity - used < need + skip:
            return False
        if skip:
            _LENGTH.pack_into(self._records, at, _WRAP)
            written += skip
            at = 0
        _LENGTH.pack_into(self._records, at, len(record))
        self._records[at + 4 : at + 4 + len(record)] = record
        self._written = self._positions[0] = written + need
        return True

    def pop_all(self) -> list[bytes]:
        """Every record that is there now, in order, as copies.

        Raises ProtocolError when the other side has written something that is not a record.
        """
        written, read = self._positions[0], self._read
        if written == read:
            return []
        if not 0 < written - read <= self._capacity or written % 8:
            raise ProtocolError("the ring's positions are impossible")
        found: list[bytes] = []
        while read < written:
            at = read % self._capacity
            (length,) = _LENGTH.unpack_from(self._records, at)
            if length == _WRAP:
                read += self._capacity - at
                if at == 0 or read >= written:
                    raise ProtocolError("the ring wraps around nothing")
                continue
            if length > self._capacity - at - 4 or read + length + 4 > written:
                raise ProtocolError(f"a record of {length} bytes reaches beyond the ring")
            found.append(bytes(self._records[at + 4 : at + 4 + length]))
            read += (length + 11) & ~7
        self._read = self._positions[8] = read
        return found
