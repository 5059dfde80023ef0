"""Files that hold keys and rosters: whole or not there, never over another, never readable by others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedml_core import private_files
from fedml_core.errors import ConfigError


def test_a_new_file_has_its_mode_and_nothing_else_is_left(tmp_path: Path) -> None:
    private_files.write_new(tmp_path / "a", b"secret", private_files.SECRET)
    assert [(path.name, path.read_bytes(), path.stat().st_mode & 0o777) for path in tmp_path.iterdir()] == [
        ("a", b"secret", 0o600)
    ]


def test_an_existing_file_is_not_touched_and_no_draft_is_left(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(ConfigError, match="a exists already and is not overwritten; move it away first"):
        private_files.write_new(tmp_path / "a", b"new", private_files.SECRET)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def test_a_dangling_link_counts_as_an_existing_file(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="exists already"):
        private_files.write_new(tmp_path / "a", b"new", private_files.SECRET)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("write", [private_files.write_new, private_files.replace])
def test_a_full_disk_leaves_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: object) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="a cannot be written: No space left on device; check the folder"):
        write(tmp_path / "a", b"x", private_files.SHARED)  # type: ignore[operator]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written: No such file or directory"):
        private_files.replace(tmp_path / "none" / "a", b"x", private_files.SHARED)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="the folder .*file/b cannot be made: Not a directory; choose another"):
        private_files.make_folder(tmp_path / "file" / "b")


def test_replacing_keeps_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        private_files.replace(path, b"new", private_files.SECRET)
        assert reader.read() == b"old"
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", 0o600)


def test_what_cannot_be_replaced_stays_and_no_draft_is_left(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(ConfigError, match="a cannot be written"):
        private_files.replace(tmp_path / "a", b"x", private_files.SHARED)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_of_the_wrong_size_is_not_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert private_files.read(tmp_path / "a", "the key", limit_bytes=5) == b"12345"
    with pytest.raises(ConfigError, match="the key .*a is longer than 4 bytes; is it the right file?"):
        private_files.read(tmp_path / "a", "the key", limit_bytes=4)
