"""Zip archives from strangers: read within bounds, and shown to torch as only those records that were inspected.

torch reads archives with a parser of its own. An `ArchiveView` is a new archive that this module lays out over the old
file: whatever a crafted file might make the two parsers disagree on, torch sees what was inspected and nothing else.
No record is decompressed or copied until it is read.
"""

from __future__ import annotations

import bisect
import io
import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ensemble_worker.errors import InvalidArchive

if TYPE_CHECKING:
    from collections.abc import Buffer, Iterable  # type: ignore[attr-defined,unused-ignore]
    from pathlib import Path
    from typing import Any

MAX_RECORDS = 200_000
MAX_INFLATED_BYTES = 256 << 20
MAX_TEXT_BYTES = 512 << 20
CHUNK_BYTES = 1 << 20
LOCAL_HEADER = struct.Struct("<4s5H3L2H")
CENTRAL_HEADER = struct.Struct("<4s6H3L5H2L")
ZIP64_END = struct.Struct("<4sQ2H2L4Q")
ZIP64_LOCATOR = struct.Struct("<4sLQL")
END = struct.Struct("<4s4H2LH")
ZIP64_MARK_32, ZIP64_MARK_16 = 0xFFFFFFFF, 0xFFFF
ZIP_VERSION = 45


@dataclass(frozen=True, slots=True)
class Record:
    """One file of an archive: its bytes lie at `offset` of the file, deflated if `deflated`."""

    name: str
    offset: int
    size: int
    stored_size: int
    crc: int
    deflated: bool


@dataclass(frozen=True, slots=True)
class Archive:
    """The records of a zip file by their name below its one top folder (torch calls the folder what it likes)."""

    path: Path
    records: dict[str, Record]

    def read(self, name: str, limit_bytes: int = MAX_TEXT_BYTES) -> bytes:
        """The bytes of a record, inflated.

        Raises InvalidArchive if there is no such record, it is larger than `limit_bytes`, or its bytes are damaged.
        """
        record = self.records.get(name)
        if record is None:
            raise InvalidArchive(f"{name} is missing: the file is truncated, or not of the declared format")
        if record.size > limit_bytes:
            raise InvalidArchive(f"{name} has {record.size} bytes, over the limit of {limit_bytes}")
        with self.path.open("rb") as file:
            file.seek(record.offset)
            raw = file.read(record.stored_size)
        try:
            content = _inflate(raw, record.size) if record.deflated else raw
        except zlib.error as error:
            raise InvalidArchive(f"{name} is damaged: {error}") from error
        if len(content) != record.size or zlib.crc32(content) != record.crc:
            raise InvalidArchive(f"{name} is damaged: its checksum differs")
        return content

    def verify(self, names: Iterable[str]) -> None:
        """Compare records with their checksums, a chunk at a time: torch does not.

        Raises InvalidArchive naming the first damaged record.
        """
        with self.path.open("rb") as file:
            for name in names:
                record = self.records[name]
                if record.deflated:
                    self.read(name, MAX_INFLATED_BYTES)
                    continue
                file.seek(record.offset)
                left, crc = record.size, 0
                while left and (chunk := file.read(min(left, CHUNK_BYTES))):
                    crc, left = zlib.crc32(chunk, crc), left - len(chunk)
                if left or crc != record.crc:
                    raise InvalidArchive(f"{name} is damaged: its checksum differs")


def open_archive(path: Path) -> Archive:
    """The directory of a zip file.

    Raises InvalidArchive if it is no zip file, is truncated, encrypted, holds a name twice or outside of one top
    folder, or claims more than it can hold: stored records beyond the file's size, or inflated ones beyond 256 MiB.
    """
    try:
        with zipfile.ZipFile(path) as zipped:
            entries = zipped.infolist()
        file_bytes = path.stat().st_size
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, UnicodeDecodeError, struct.error) as error:
        raise InvalidArchive(
            f"not a readable zip archive ({error}): truncated, or not of the declared format"
        ) from error
    if len(entries) > MAX_RECORDS:
        raise InvalidArchive(f"{len(entries)} records, over the limit of {MAX_RECORDS}")
    files = [entry for entry in entries if not entry.is_dir()]
    roots = {entry.filename.split("/", 1)[0] for entry in files}
    if len(roots) != 1 or any("/" not in entry.filename for entry in files):
        raise InvalidArchive("the archive has not exactly one top folder: not written by torch")
    if sum(e.compress_size for e in files) > file_bytes:
        raise InvalidArchive(f"records claim more than the file's {file_bytes} bytes: truncated or crafted")
    inflated = sum(e.file_size for e in files if e.compress_type == zipfile.ZIP_DEFLATED)
    if inflated > MAX_INFLATED_BYTES:
        raise InvalidArchive(f"compressed records inflate to {inflated} bytes, over the limit of {MAX_INFLATED_BYTES}")
    records: dict[str, Record] = {}
    with path.open("rb") as file:
        for entry in files:
            record = _record(entry, file)
            if record.name in records:
                raise InvalidArchive(f"{record.name} is there twice")
            records[record.name] = record
    return Archive(path, records)


class ArchiveView(io.RawIOBase):
    """A zip archive to read, made of bytes given and of records of another archive, which are not copied."""

    def __init__(self, archive: Archive, kept: Iterable[str], given: dict[str, bytes], root: str = "model") -> None:
        super().__init__()
        self._file = archive.path.open("rb")
        self._starts: list[int] = []
        self._parts: list[bytes | Record] = []
        self._size = 0
        self._position = 0
        self._lay_out(archive, kept, given, root)

    def readable(self) -> bool:
        """True: the view can be read."""
        return True

    def seekable(self) -> bool:
        """True: the view can be read in any order."""
        return True

    def tell(self) -> int:
        """The current position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position; the new one."""
        base = (0, self._position, self._size)[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        """Fill `buffer` from the position on; how many bytes were there. Only a read at the end gives fewer."""
        target = memoryview(buffer).cast("B")
        done = 0
        while done < len(target) and self._position < self._size:
            index = bisect.bisect_right(self._starts, self._position) - 1
            part, within = self._parts[index], self._position - self._starts[index]
            chunk: Any = target[done:]
            if isinstance(part, Record):
                chunk = chunk[: part.size - within]
                self._file.seek(part.offset + within)
                count = self._file.readinto(chunk)
                if not count:
                    raise InvalidArchive(f"{part.name} ends early: the file was truncated while it was read")
            else:
                source = part[within : within + len(chunk)]
                count = len(source)
                chunk[:count] = source
            done += count
            self._position += count
        return done

    def readall(self) -> bytes:
        """Everything from the position on, in one copy."""
        content = bytearray(self._size - self._position)
        self.readinto(content)
        return bytes(content)

    def close(self) -> None:
        """Close the file below."""
        self._file.close()
        super().close()

    def _append(self, part: bytes | Record) -> None:
        length = part.size if isinstance(part, Record) else len(part)
        if length:
            self._starts.append(self._size)
            self._parts.append(part)
            self._size += length

    def _lay_out(self, archive: Archive, kept: Iterable[str], given: dict[str, bytes], root: str) -> None:
        contents: list[tuple[str, bytes | Record]] = []
        for name in kept:
            record = archive.records[name]
            contents.append((name, archive.read(name, MAX_INFLATED_BYTES) if record.deflated else record))
        contents += given.items()
        central = bytearray()
        for name, content in contents:
            size = content.size if isinstance(content, Record) else len(content)
            crc = content.crc if isinstance(content, Record) else zlib.crc32(content)
            encoded = f"{root}/{name}".encode()
            central += _central_entry(encoded, crc, size, self._size)
            self._append(_local_header(encoded, crc, size))
            self._append(content)
        directory_offset = self._size
        self._append(bytes(central))
        self._append(_end(len(contents), len(central), directory_offset))


def _record(entry: zipfile.ZipInfo, file: io.BufferedReader) -> Record:
    name = entry.filename.split("/", 1)[1]
    if entry.flag_bits & 0x1:
        raise InvalidArchive(f"{name} is encrypted")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InvalidArchive(f"{name} is compressed by method {entry.compress_type}: only stored and deflated are read")
    deflated = entry.compress_type == zipfile.ZIP_DEFLATED
    if not deflated and entry.file_size != entry.compress_size:
        raise InvalidArchive(f"{name} has two sizes: {entry.file_size} and {entry.compress_size}")
    if entry.header_offset < 0:
        raise InvalidArchive(f"{name} is damaged: it begins before the file")
    file.seek(entry.header_offset)
    header = file.read(LOCAL_HEADER.size)
    if len(header) < LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
        raise InvalidArchive(f"{name} is damaged: its header is not where the directory says")
    name_length, extra_length = LOCAL_HEADER.unpack(header)[-2:]
    offset = entry.header_offset + LOCAL_HEADER.size + name_length + extra_length
    return Record(name, offset, entry.file_size, entry.compress_size, entry.CRC, deflated)


def _inflate(raw: bytes, size: int) -> bytes:
    """At most one byte more than announced, so that a lie about the size is seen and costs nothing."""
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(raw, size + 1)


def _zip64(*values: int) -> bytes:
    return struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values)


def _local_header(name: bytes, crc: int, size: int) -> bytes:
    extra = _zip64(size, size)
    mark = ZIP64_MARK_32
    header = LOCAL_HEADER.pack(b"PK\x03\x04", ZIP_VERSION, 0x800, 0, 0, 0, crc, mark, mark, len(name), len(extra))
    return header + name + extra


def _central_entry(name: bytes, crc: int, size: int, offset: int) -> bytes:
    extra = _zip64(size, size, offset)
    mark = ZIP64_MARK_32
    sizes = (crc, mark, mark, len(name), len(extra))
    return (
        CENTRAL_HEADER.pack(b"PK\x01\x02", ZIP_VERSION, ZIP_VERSION, 0x800, 0, 0, 0, *sizes, 0, 0, 0, 0, mark)
        + name
        + extra
    )


def _end(count: int, directory_size: int, directory_offset: int) -> bytes:
    end64_offset = directory_offset + directory_size
    fields = (ZIP64_END.size - 12, ZIP_VERSION, ZIP_VERSION, 0, 0, count, count, directory_size, directory_offset)
    end64 = ZIP64_END.pack(b"PK\x06\x06", *fields) + ZIP64_LOCATOR.pack(b"PK\x06\x07", 0, end64_offset, 1)
    mark = ZIP64_MARK_16
    return end64 + END.pack(b"PK\x05\x06", 0, 0, mark, mark, ZIP64_MARK_32, ZIP64_MARK_32, 0)
