"""Files that hold a tree: whole or not at all, and checked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedml_core.errors import CheckpointError
from fedml_core.storage import load_tree, save_tree, write_atomically

TREE = {"round": 3, "name": "a", "none": None, "nested": {"x": torch.arange(4.0), "list": [1, torch.ones(2, 2)]}}


def test_a_tree_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    save_tree(tmp_path / "file", "kind", TREE)
    back = load_tree(tmp_path / "file", "kind")
    assert back["round"] == 3 and back["none"] is None
    assert torch.equal(back["nested"]["x"], torch.arange(4.0))
    assert torch.equal(back["nested"]["list"][1], torch.ones(2, 2))


@pytest.mark.parametrize(
    "value",
    [torch.tensor(0.1), torch.zeros(0), torch.tensor([float("nan"), 1.0]), torch.tensor([1, 2]), torch.tensor(True)],
)
def test_every_bit_of_a_tensor_survives(tmp_path: Path, value: torch.Tensor) -> None:
    save_tree(tmp_path / "file", "kind", {"x": value})
    back = load_tree(tmp_path / "file", "kind")["x"]
    assert back.dtype == value.dtype and back.shape == value.shape
    assert back.numpy().tobytes() == value.numpy().tobytes()


def test_a_float_survives_exactly(tmp_path: Path) -> None:
    save_tree(tmp_path / "file", "kind", {"x": 0.1 + 0.2, "inf": float("inf")})
    assert load_tree(tmp_path / "file", "kind") == {"x": 0.1 + 0.2, "inf": float("inf")}


def test_any_changed_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_tree(path, "kind", {"x": torch.arange(16.0), "y": "text"})
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError):
            load_tree(path, "kind")


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_tree(path, "kind", TREE)
    whole = path.read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            load_tree(path, "kind")


def test_a_file_of_another_kind_or_none_is_refused_with_what_to_do(tmp_path: Path) -> None:
    save_tree(tmp_path / "file", "memory", TREE)
    with pytest.raises(CheckpointError, match="expected fedveil/1 'checkpoint'"):
        load_tree(tmp_path / "file", "checkpoint")
    with pytest.raises(CheckpointError, match="does not exist; start without --resume"):
        load_tree(tmp_path / "nothing", "checkpoint")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot open folders, and flushes none")
def test_a_file_is_flushed_renamed_and_its_folder_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, Path.replace

    def flushed(handle: int) -> None:
        done.append("folder" if os.fstat(handle).st_ino == tmp_path.stat().st_ino else "file")
        fsync(handle)

    def renamed(draft: Path, target: Path) -> Path:
        done.append("rename")
        return rename(draft, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    write_atomically(tmp_path / "file", b"new")
    assert done == ["file", "rename", "folder"]


WRITER = """
import sys, torch
from pathlib import Path
from fedml_core.storage import save_tree
round = 0
while True:
    round += 1
    save_tree(Path(sys.argv[1]), "kind", {"round": round, "x": torch.full((50_000,), float(round))})
    if round == 3:
        print("ready", flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            process.send_signal(signal.SIGKILL)
        tree = load_tree(path, "kind")
        assert torch.equal(tree["x"], torch.full((50_000,), float(tree["round"])))
