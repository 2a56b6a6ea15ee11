"""Archives: what a zip file may claim, and the view that torch gets."""

from __future__ import annotations

import io
import random
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_worker.archive import ArchiveView, open_archive
from ensemble_worker.errors import InvalidArchive


def _zip(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as zipped:
        for name, content in files.items():
            zipped.writestr(name, content)
    return path


FILES = {"m/a.json": b"{}", "m/data/0": bytes(range(256)) * 40, "m/data/1": b"", "m/secret.pkl": b"cos\nsystem\n."}


def test_a_view_holds_the_kept_and_the_given_and_nothing_else(tmp_path: Path) -> None:
    archive = open_archive(_zip(tmp_path / "a.zip", FILES))
    view = ArchiveView(archive, ["data/0", "data/1"], {"a.json": b'{"new": 1}'}, root="r")
    with zipfile.ZipFile(io.BytesIO(view.readall())) as seen:
        assert seen.testzip() is None
        assert {n: seen.read(n) for n in seen.namelist()} == {
            "r/data/0": FILES["m/data/0"],
            "r/data/1": b"",
            "r/a.json": b'{"new": 1}',
        }
    view.close()


def test_compressed_records_are_shown_inflated(tmp_path: Path) -> None:
    archive = open_archive(_zip(tmp_path / "a.zip", FILES, zipfile.ZIP_DEFLATED))
    with ArchiveView(archive, ["data/0"], {}) as view, zipfile.ZipFile(view) as seen:
        assert seen.read("model/data/0") == FILES["m/data/0"]


@given(st.lists(st.tuples(st.integers(0, 12_000), st.integers(0, 3_000)), max_size=20))
def test_a_view_reads_alike_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, reads: list[tuple[int, int]]
) -> None:
    archive = open_archive(_zip(tmp_path_factory.mktemp("z") / "a.zip", FILES))
    with ArchiveView(archive, ["data/0", "a.json"], {"x": b"y" * 100}) as view:
        whole = view.readall()
        for offset, count in reads:
            view.seek(offset)
            assert view.read(count) == whole[offset : offset + count]


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    path = _zip(tmp_path / "a.zip", FILES)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InvalidArchive, match="truncated"):
        open_archive(path)


def test_a_changed_byte_is_found_and_named(tmp_path: Path) -> None:
    path = _zip(tmp_path / "a.zip", FILES)
    content = bytearray(path.read_bytes())
    content[content.index(FILES["m/data/0"]) + 5000] ^= 1
    path.write_bytes(content)
    archive = open_archive(path)
    with pytest.raises(InvalidArchive, match="data/0 is damaged"):
        archive.verify(archive.records)


def test_a_zip_bomb_is_refused_before_it_is_inflated(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped, zipped.open("m/code/a.py", "w") as record:
        for _ in range(300):
            record.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(InvalidArchive, match="over the limit"):
        open_archive(path)


def test_a_lie_about_the_inflated_size_is_found(tmp_path: Path) -> None:
    path = _zip(tmp_path / "a.zip", {"m/a": bytes(100_000)}, zipfile.ZIP_DEFLATED)
    path.write_bytes(path.read_bytes().replace((100_000).to_bytes(4, "little"), (50).to_bytes(4, "little")))
    archive = open_archive(path)
    with pytest.raises(InvalidArchive, match="damaged"):
        archive.read("a")


@pytest.mark.parametrize("files", [{"a": b"1"}, {"m/a": b"1", "n/b": b"2"}, {}])
def test_there_must_be_one_top_folder(tmp_path: Path, files: dict[str, bytes]) -> None:
    with pytest.raises(InvalidArchive, match="top folder"):
        open_archive(_zip(tmp_path / "a.zip", files))


def test_a_name_must_not_be_there_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("m/a", b"1")
        with pytest.warns(UserWarning, match="Duplicate"):
            zipped.writestr("m/a", b"2")
    with pytest.raises(InvalidArchive, match="twice"):
        open_archive(path)


def test_random_damage_never_raises_anything_else(tmp_path: Path) -> None:
    path = _zip(tmp_path / "a.zip", FILES, zipfile.ZIP_DEFLATED)
    whole, chance = path.read_bytes(), random.Random(1)
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(chance.randint(1, 8)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        path.write_bytes(content[: chance.randint(1, len(content))] if chance.random() < 0.3 else content)
        try:
            archive = open_archive(path)
            archive.verify(archive.records)
        except InvalidArchive:
            continue
