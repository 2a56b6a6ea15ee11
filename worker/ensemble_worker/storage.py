"""Model files from where they are kept: local ones in place, remote ones once into a content-addressed cache.

The only file that imports fsspec. A cached file is named by its sha256 where the plan tells it, else by its URI and
what the server says of its version. Workers of one machine share the cache: one downloads under a file lock, the
others wait.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import shutil
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ensemble_contract.plan import ModelSource
from ensemble_contract.pod import CLAIMS_FOLDER
from ensemble_worker.errors import ModelError

log = logging.getLogger(__name__)

T = TypeVar("T")

# Called with the bytes there are and the bytes there will be (None: the server does not say).
Progress = Callable[[int, int | None], None]

CACHE_VARIABLE = "ENSEMBLE_CACHE_DIR"
CHUNK_BYTES = 8 << 20
ATTEMPTS = 5
FIRST_DELAY_S = 0.5
SPARE_DISK_BYTES = 64 << 20
LOCK_POLL_S = 0.1
LOG_EVERY_S = 5.0
FINAL_STATUSES = {
    401: "the server wants credentials",
    403: "the server refuses it: no permission",
    404: "not found on the server",
    410: "not found on the server any more",
}
VERSION_FIELDS = ("ETag", "etag", "sha256", "size", "mtime", "LastModified", "last_modified", "generation")


def fetch(
    source: ModelSource, cache_dir: Path, progress: Progress | None = None, chunk_bytes: int = CHUNK_BYTES
) -> Path:
    """The model file on this machine, its sha256 verified where the source gives one.

    An interrupted download is resumed, by this call or by a later one. Raises ModelError naming member, URI and cause.
    """
    try:
        local = local_path(source.uri)
        if local is not None:
            _check_local(local, source.sha256)
            return local
        return _fetch_remote(source, cache_dir, progress or _silent, chunk_bytes)
    except _Refused as error:
        raise ModelError(source.name, source.uri, str(error), may_pass=error.may_pass) from error
    except OSError as error:
        raise ModelError(source.name, source.uri, _explain(error, cache_dir), may_pass=True) from error


def default_cache_dir() -> Path:
    """ENSEMBLE_CACHE_DIR, else `ensemble-operator` in the user's cache folder (XDG Base Directory Specification)."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ensemble-operator"


def local_path(uri: str) -> Path | None:
    """The path of a `file:` URI, of a file on a mounted claim (`pvc:`) or a bare path; None for what lies elsewhere."""
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme == "file":
        return Path(urllib.parse.unquote(parts.path))
    if parts.scheme == "pvc":
        return Path(CLAIMS_FOLDER, parts.netloc, urllib.parse.unquote(parts.path).lstrip("/"))
    return None if parts.scheme else Path(uri)


def log_progress(name: str) -> Progress:
    """A progress callback that writes a line to the log every few seconds and one at the end."""

    def report(done: int, total: int | None) -> None:
        share = f" of {total / 2**20:.1f} MiB ({100 * done // max(1, total)} %)" if total is not None else ""
        log.info("%s: downloaded %.1f MiB%s", name, done / 2**20, share)

    return at_most_every(LOG_EVERY_S, report)


def at_most_every(period_s: float, report: Progress) -> Progress:
    """`report`, called when so much time has passed since the last call, and at the end."""
    last = time.monotonic()

    def sometimes(done: int, total: int | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= period_s or done == total:
            last = now
            report(done, total)

    return sometimes


class _Refused(Exception):
    """The file cannot be had; the message is the cause. `may_pass`: perhaps later it can."""

    def __init__(self, cause: str, *, may_pass: bool = True) -> None:
        super().__init__(cause)
        self.may_pass = may_pass


def _silent(done: int, total: int | None) -> None:
    """No progress is shown."""


def _check_local(path: Path, sha256: str) -> None:
    if not path.exists():
        raise _Refused(f"there is no file {path} on this machine")
    if not path.is_file():
        raise _Refused(f"{path} is not a file")
    if sha256:
        _check_digest(path, sha256)


def _check_digest(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != sha256.lower():
        # Downloading it again and again would cost much and bring the same.
        raise _Refused(f"its sha256 is {actual}, declared is {sha256}: another file, or changed since", may_pass=False)


def _fetch_remote(source: ModelSource, cache_dir: Path, progress: Progress, chunk_bytes: int) -> Path:
    suffix = Path(urllib.parse.urlsplit(source.uri).path).suffix
    folder = cache_dir / "models"
    if source.sha256:
        wanted = folder / f"{source.sha256.lower()}{suffix}"
        if wanted.exists():
            return wanted
    filesystem, remote = _filesystem(source.uri)
    described = _describe(filesystem, remote)
    if not source.sha256:
        version = [str(described[field]) for field in VERSION_FIELDS if described.get(field) is not None]
        key = hashlib.sha256("\n".join([source.uri, *version]).encode()).hexdigest()
        wanted = folder / f"uri-{key}{suffix}"
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(wanted.with_name(wanted.name + ".lock")):
        if not wanted.exists():
            _download(filesystem, remote, described.get("size"), wanted, source.sha256, progress, chunk_bytes)
    return wanted


def _filesystem(uri: str) -> tuple[Any, str]:
    """The file system for a URI, and the path in it. Instances are not shared: each fetch sees the server as it is."""
    try:
        import fsspec
    except ImportError as error:
        cause = "remote models need fsspec: pip install 'ensemble-operator[worker]'"
        raise _Refused(cause, may_pass=False) from error
    scheme = urllib.parse.urlsplit(uri).scheme
    try:
        filesystem, remote = fsspec.core.url_to_fs(uri, skip_instance_cache=True, use_listings_cache=False)
    except ImportError as error:
        cause = f"{scheme}: needs more packages: pip install 'ensemble-operator[storage]' ({error})"
        raise _Refused(cause, may_pass=False) from error
    except ValueError as error:
        cause = f"{scheme}: is not a place that models can be fetched from ({error})"
        raise _Refused(cause, may_pass=False) from error
    return filesystem, str(remote)


def _describe(filesystem: Any, remote: str) -> dict[str, Any]:
    def ask() -> dict[str, Any]:
        try:
            return dict(filesystem.info(remote))
        except FileNotFoundError as error:
            # fsspec's HTTP file system says so of servers that do not answer, too; then the cause is something else.
            cause = error.__cause__
            if isinstance(cause, Exception) and not isinstance(cause, FileNotFoundError) and _is_http(filesystem):
                raise cause from error
            raise

    return _persistently(ask, lambda: 0)


def _is_http(filesystem: Any) -> bool:
    return "http" in filesystem.protocol


def _download(
    filesystem: Any,
    remote: str,
    size: int | None,
    wanted: Path,
    sha256: str,
    progress: Progress,
    chunk_bytes: int,
) -> None:
    """Into a partial file, which a later attempt goes on with, then in one step to its place."""
    partial = wanted.with_name(wanted.name + ".part")
    _check_space(wanted.parent, size, partial)
    reached, block_bytes = 0, chunk_bytes

    def attempt() -> None:
        nonlocal reached, block_bytes
        try:
            reached = _append(filesystem, remote, size, partial, progress, block_bytes)
        except ValueError:  # fsspec's word for a server without range requests; a block size of 0 asks for a stream
            if not block_bytes:
                raise
            block_bytes = 0
            reached = _append(filesystem, remote, size, partial, progress, block_bytes)

    _persistently(attempt, lambda: partial.stat().st_size if partial.exists() else 0)
    if size is not None and reached != size:
        partial.unlink()
        raise _Refused(f"the server sent {reached} bytes of {size}")
    if sha256:
        try:
            _check_digest(partial, sha256)
        except _Refused:
            partial.unlink()
            raise
    partial.replace(wanted)


def _append(filesystem: Any, remote: str, size: int | None, partial: Path, progress: Progress, block_bytes: int) -> int:
    """Read on from where the partial file ends, without range requests from the beginning; its bytes then."""
    with (
        filesystem.open(remote, "rb", block_size=block_bytes, cache_type="none") as stream,
        partial.open("ab") as file,
    ):
        done = file.tell()
        if done and (size is None or done > size or not _seeks(stream, done)):
            file.truncate(done := 0)
        while chunk := stream.read(block_bytes or CHUNK_BYTES):
            file.write(chunk)
            done += len(chunk)
            progress(done, size)
        file.flush()
        os.fsync(file.fileno())
    return done


def _seeks(stream: Any, position: int) -> bool:
    try:
        stream.seek(position)
    except (ValueError, OSError, NotImplementedError):
        return False
    return True


def _persistently(act: Callable[[], T], reached: Callable[[], int]) -> T:
    """Repeat what a network interrupts, with growing pauses; an attempt that got further counts as a first one.

    What repeating does not cure (not found, no permission, no space) passes at once.
    """
    attempt, furthest = 0, reached()
    while True:
        try:
            return act()
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError):
            raise
        except Exception as error:  # each file system brings its client's errors, which share no base class.
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EROFS, errno.EDQUOT):
                raise
            if (status := getattr(error, "status", 0)) in FINAL_STATUSES:
                raise _Refused(FINAL_STATUSES[status]) from error
            attempt, furthest = (0, reached()) if reached() > furthest else (attempt + 1, furthest)
            if attempt >= ATTEMPTS:
                raise _Refused(f"cannot be fetched: {type(error).__name__}: {error}") from error
            delay_s = FIRST_DELAY_S * 2**attempt
            log.warning("interrupted (%s: %s), next attempt in %.1f s", type(error).__name__, error, delay_s)
            time.sleep(delay_s)


def _check_space(folder: Path, size: int | None, partial: Path) -> None:
    there = partial.stat().st_size if partial.exists() else 0
    free = shutil.disk_usage(folder).free
    if size is not None and size - there + SPARE_DISK_BYTES > free:
        raise _Refused(f"needs {(size - there) / 2**20:.0f} MiB in {folder}, which has {free / 2**20:.0f} MiB free")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with its process."""
    with path.open("w") as file:
        waited = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waited:
                    log.info("another process downloads %s: waiting", path.stem)
                waited = True
                time.sleep(LOCK_POLL_S)
        yield


def _explain(error: OSError, cache_dir: Path) -> str:
    if error.errno == errno.ENOSPC:
        return f"no space left in {cache_dir}: free some, or use another cache folder"
    if isinstance(error, FileNotFoundError):
        return f"not found: {error}"
    if isinstance(error, PermissionError):
        return f"no permission: {error}"
    return f"cannot be fetched: {error or type(error).__name__}"
