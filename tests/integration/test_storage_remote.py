"""Model files over http and s3, from real servers: resumed, verified, downloaded once, and refused clearly."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ensemble_contract.plan import ModelSource
from ensemble_worker import storage
from ensemble_worker.errors import ModelError

CONTENT = b"".join(hashlib.sha256(i.to_bytes(4, "big")).digest() for i in range(100_000))
DIGEST = hashlib.sha256(CONTENT).hexdigest()
CHUNK_BYTES = 1 << 20


@dataclass
class Web:
    """What the server serves, how it misbehaves, and what it saw."""

    content: bytes = CONTENT
    etag: str = '"one"'
    drop_after_bytes: list[int] = field(default_factory=list)
    ranges: bool = True
    sent_bytes: int = 0
    gets: int = 0
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    """One file with ETag and Range; it may hang up in the middle."""

    web: Web
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self.web.gets += 1
        self._answer(body=True)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the name is the base class's
        """Silence."""

    def _answer(self, *, body: bool) -> None:
        web = self.web
        if self.path != "/models/m.pt2":
            self.send_error(404)
            return
        start, stop, status = 0, len(web.content), 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and web.ranges:
            start, stop, status = int(asked[1]), min(stop, int(asked[2] or stop) + 1), 206
        self.send_response(status)
        if web.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(web.content)}")
        self.send_header("ETag", web.etag)
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if not body:
            return
        part = web.content[start:stop]
        if web.drop_after_bytes and len(part) > web.drop_after_bytes[0]:
            part = part[: web.drop_after_bytes.pop(0)]
            self.close_connection = True
        self.wfile.write(part)
        web.sent_bytes += len(part)


class QuietServer(ThreadingHTTPServer):
    """Clients that hang up are what some tests are about."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Silence."""


@pytest.fixture
def web() -> Iterator[Web]:
    seen = Web()
    server = QuietServer(("127.0.0.1", 0), type("Bound", (Handler,), {"web": seen}))
    seen.url = f"http://127.0.0.1:{server.server_address[1]}/models/m.pt2"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield seen
    server.shutdown()
    server.server_close()
    thread.join(5)


def _fetch(uri: str, cache: Path, sha256: str = "", **more: Any) -> Path:
    source = ModelSource("cat", "d", uri, "torch-export", sha256=sha256)
    return storage.fetch(source, cache, chunk_bytes=CHUNK_BYTES, **more)


@pytest.mark.parametrize("sha256", [DIGEST, ""])
def test_a_file_is_downloaded_once(web: Web, tmp_path: Path, sha256: str) -> None:
    seen: list[tuple[int, int | None]] = []
    path = _fetch(web.url, tmp_path, sha256, progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert path.suffix == ".pt2"
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    sent = web.sent_bytes
    assert _fetch(web.url, tmp_path, sha256) == path
    assert web.sent_bytes == sent


def test_a_dropped_connection_is_resumed(web: Web, tmp_path: Path) -> None:
    web.drop_after_bytes = [CHUNK_BYTES // 2, CHUNK_BYTES // 3]
    assert _fetch(web.url, tmp_path, DIGEST).read_bytes() == CONTENT
    assert not web.drop_after_bytes
    assert web.sent_bytes < len(CONTENT) + 2 * CHUNK_BYTES


def test_a_later_process_goes_on_where_one_was_killed(web: Web, tmp_path: Path) -> None:
    half = len(CONTENT) // 2
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / f"{DIGEST}.pt2.part").write_bytes(CONTENT[:half])
    assert _fetch(web.url, tmp_path, DIGEST).read_bytes() == CONTENT
    assert web.sent_bytes == len(CONTENT) - half


def test_a_server_without_ranges_is_read_from_the_beginning(web: Web, tmp_path: Path) -> None:
    web.ranges = False
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / f"{DIGEST}.pt2.part").write_bytes(b"something else")
    assert _fetch(web.url, tmp_path, DIGEST).read_bytes() == CONTENT


def test_a_new_version_of_a_file_is_seen(web: Web, tmp_path: Path) -> None:
    first = _fetch(web.url, tmp_path)
    web.content, web.etag = CONTENT[::-1], '"two"'
    second = _fetch(web.url, tmp_path)
    assert first != second
    assert second.read_bytes() == CONTENT[::-1]


def test_a_wrong_digest_leaves_nothing_behind(web: Web, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"its sha256 is {DIGEST}"):
        _fetch(web.url, tmp_path, "0" * 64)
    assert [p.suffix for p in (tmp_path / "models").iterdir()] == [".lock"]


def test_what_is_not_there_is_said_at_once(web: Web, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not found"):
        _fetch(web.url.replace("m.pt2", "n.pt2"), tmp_path)
    assert web.gets <= 1


def test_a_dead_server_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_DELAY_S", 0.01)
    with pytest.raises(ModelError, match=r"cannot be fetched: .*127\.0\.0\.1"):
        _fetch("http://127.0.0.1:9/m.pt2", tmp_path)


def test_a_cache_that_cannot_be_made_is_said(web: Web, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"cannot be fetched|no permission"):
        _fetch(web.url, tmp_path / "file", DIGEST)


def test_a_full_disk_is_said_before_it_is_full(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "SPARE_DISK_BYTES", 1 << 60)
    with pytest.raises(ModelError, match=r"needs 3 MiB in .*models, which has"):
        _fetch(web.url, tmp_path, DIGEST)


FETCH = """
import sys, msgspec
from pathlib import Path
from ensemble_contract.plan import ModelSource
from ensemble_worker import storage
print(storage.fetch(msgspec.json.decode(sys.argv[1], type=ModelSource), Path(sys.argv[2])))
"""


def test_processes_download_once_between_them(web: Web, tmp_path: Path) -> None:
    source = msgspec.json.encode(ModelSource("cat", "d", web.url, "torch-export", sha256=DIGEST)).decode()
    command = [sys.executable, "-c", FETCH, source, str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {process.communicate(timeout=60)[0].strip() for process in running}
    assert len(paths) == 1
    assert Path(paths.pop()).read_bytes() == CONTENT
    assert web.sent_bytes == len(CONTENT)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    import s3fs

    files = s3fs.S3FileSystem(skip_instance_cache=True)
    files.mkdir("bucket")
    files.pipe_file("bucket/models/m.pt2", CONTENT)
    yield "s3://bucket/models/m.pt2"
    server.stop()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_s3(s3: str, tmp_path: Path) -> None:
    path = _fetch(s3, tmp_path, DIGEST)
    assert path.read_bytes() == CONTENT
    assert _fetch(s3, tmp_path).read_bytes() == CONTENT
    with pytest.raises(ModelError, match="not found"):
        _fetch("s3://bucket/models/none.pt2", tmp_path)
